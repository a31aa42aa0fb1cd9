"""ComfyUI and the translations: the English texts are those of the nodes, and ComfyUI serves all languages."""

from tools import locales


def test_english_texts_are_those_of_the_nodes(comfyui):
    assert locales.read_files("en") == locales.english(comfyui.object_info()), "run `make locales`"


def test_comfyui_serves_the_translations(comfyui):
    served = comfyui.get("/i18n")
    for language in ("en", *locales.LANGUAGES):
        files = locales.read_files(language)
        assert served[language] == {"nodeDefs": files["nodeDefs.json"], **files["main.json"]}


def test_comfyui_serves_the_help_pages(comfyui):
    for page in locales.english_pages():
        for language in locales.LANGUAGES_OF_PAGES:
            path = locales.translated_page(page, language)
            served = comfyui.get(f"/extensions/stochastic-fp8/docs/{page.stem}/{language}.md")
            assert served.decode() == path.read_text(encoding="utf-8")
