"""Translations are complete, up to date with the English texts, and such that ComfyUI's page shows them.

`make locales` brings locales/ up to date and lists what to translate.
"""

import re
import shutil

import pytest
from markdown_it import MarkdownIt
from tools import locales

SPECIAL = set("{}@|")
"""Characters with a meaning for the page's message formatter. It compiles names and descriptions, and since front end
1.49 it shows tooltips as they are, so that no way to escape these characters is right for all."""

IDENTIFIER = re.compile(r"[A-Za-z0-9]*(?:[_0-9]|\.(?=\w))[\w.]*\w|\d|\{\w+\}|PSNR|SSIM|SQNR|LoRA|VAE|JSON")
"""Names with digits, dots or underscores (float8_e4m3fn, 0.3.75, size_limit), numbers, {values}, abbreviations."""

PAGES = [
    pytest.param(page, language, id=f"{page.stem.removeprefix('StochasticFP8')}-{language}")
    for page in locales.english_pages()
    for language in locales.LANGUAGES_OF_PAGES
]


@pytest.fixture(params=locales.LANGUAGES)
def language(request):
    return request.param


@pytest.fixture
def catalogue(language):
    return locales.read_catalogue(language)


@pytest.fixture(scope="module")
def panels():
    if not shutil.which("node"):
        pytest.skip("needs node: tests/tools/environment.py --browser")
    return locales.panel_texts()


def test_catalogues_have_every_text(catalogue, panels):
    sources = locales.sources_of(locales.read_files("en"), panels)
    english = {locales.message_id(text) for tree in sources.values() for _, text in locales.texts_of(tree)}
    assert {message.id for message in locales.messages(catalogue)} == english, "run `make locales`"


def test_every_text_is_translated(catalogue):
    assert locales.untranslated(catalogue) == []


def test_files_are_the_compiled_catalogues(catalogue, language, panels):
    words = locales.words_of(catalogue)
    assert locales.read_panel_texts()[language] == locales.translated(panels, words), "run `make locales`"
    compiled = {name: locales.translated(tree, words) for name, tree in locales.read_files("en").items()}
    assert locales.read_files(language) == compiled, "run `make locales`"


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_texts_have_no_character_that_the_page_would_interpret(language):
    texts = [text for tree in locales.read_files(language).values() for _, text in locales.texts_of(tree)]
    assert [text for text in texts if SPECIAL & set(text)] == []


def pairs(catalogue):
    """(English, translation) of each message; of messages with a plural the last form."""
    for message in locales.messages(catalogue):
        yield (message.id[-1], message.string[-1]) if message.pluralizable else (message.id, message.string)


def test_translations_keep_identifiers_and_numbers(catalogue):
    lost = []
    for english, text in pairs(catalogue):
        wanted = IDENTIFIER.findall(english.replace("e.g.", "")) if " " in english else []
        lost += [(word, text) for word in wanted if word not in text]
    assert lost == []


def choices(tooltip):
    return re.findall(r"^(\w[\w ]*): ", tooltip, re.MULTILINE)


def test_translations_describe_the_same_choices(catalogue):
    different = [text for english, text in pairs(catalogue) if "\n" in english and choices(english) != choices(text)]
    assert different == []


def test_one_name_one_node(language):
    """Names of nodes differ, and so do the names of a node's inputs."""
    nodes = locales.read_files(language)["nodeDefs.json"]
    names = [node["display_name"] for node in nodes.values()]
    assert len(set(names)) == len(names)
    for node in nodes.values():
        labels = [entry["name"] for entry in node.get("inputs", {}).values()]
        assert len(set(labels)) == len(labels), node["display_name"]


@pytest.mark.parametrize(("page", "language"), PAGES)
def test_help_pages_are_translations_of_the_current_ones(page, language):
    """After a change of an English page, change its translations, and put the line that this test wants first."""
    translation = locales.translated_page(page, language)
    assert translation.read_text(encoding="utf-8").splitlines()[0] == locales.origin_line(page)


@pytest.mark.parametrize(("page", "language"), PAGES)
def test_help_pages_have_the_same_code_pictures_and_tables(page, language):
    """Pictures are relative to js/docs in the page of every language: the page resolves them from there."""
    original, translation = (
        path.read_text(encoding="utf-8") for path in (page, locales.translated_page(page, language))
    )
    assert set(locales.code_in(translation)) == set(locales.code_in(original))
    outline = re.compile(r"^(?:#+ |\||- |!)", re.MULTILINE)
    assert outline.findall(translation) == outline.findall(original)


@pytest.mark.parametrize(("page", "language"), PAGES)
def test_help_pages_name_inputs_and_outputs_as_the_node_does(page, language):
    text = locales.translated_page(page, language).read_text(encoding="utf-8")
    node, english = (locales.read_files(each)["nodeDefs.json"][page.stem] for each in (language, "en"))
    assert f"# {node['display_name']}\n" in text
    named = [(identifier, entry["name"]) for identifier, entry in node.get("inputs", {}).items()]
    named += [(english["outputs"][i]["name"], entry["name"]) for i, entry in node.get("outputs", {}).items()]
    lines = [line(identifier, name) for identifier, name in named]
    assert [line for line in lines if line not in text] == []


def line(identifier, name):
    """The beginning of the line about an input or output. Names may end with a hint in brackets."""
    short = name.split("（")[0]
    return f"\n- **{short}**：" if short == identifier else f"\n- **{short} ({identifier})**："


@pytest.mark.parametrize(("page", "language"), PAGES)
def test_emphasis_of_help_pages_ends(page, language):
    """Between a full-width mark and a letter, ** does not end bold text: it needs a space after it."""
    text = locales.translated_page(page, language).read_text(encoding="utf-8")
    assert "*" not in re.sub(r"<code>.*?</code>", "", MarkdownIt().render(text))


@pytest.mark.parametrize("language", locales.LANGUAGES_OF_PAGES)
def test_help_pages_call_nodes_by_their_translated_names(language):
    names = {node["display_name"] for node in locales.read_files(language)["nodeDefs.json"].values()}
    english = {node["display_name"] for node in locales.read_files("en")["nodeDefs.json"].values()}
    for page in locales.english_pages():
        text = locales.translated_page(page, language).read_text(encoding="utf-8")
        assert not english & set(re.findall(r"\*\*([^*]+)\*\*", text)), page.stem
        named = {name for name in english if f"**{name}**" in re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))}
        assert len({name for name in names if f"**{name}**" in text}) == len(named), page.stem
