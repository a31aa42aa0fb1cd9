"""The translations of the nodes: ``make locales``.

    the nodes -> locales/en/*.json -> locales/<language>.po -> locales/<language>/*.json
    the panels: js/words.js ----------^                    `-> js/translations.js

Writes the English texts of the nodes, as a running ComfyUI gives them, brings each catalogue up to date with them and
with those of the panels, and compiles the catalogues. A text that is new or changed is marked in its catalogue (empty
or `fuzzy`) and listed; until it is translated, the page shows the English one. locales/README.md is for translators.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from babel.messages import Catalog, Message
from babel.messages.pofile import read_po, write_po
from comfyui.server import PACK_ROOT, ComfyUIServer

FOLDER = PACK_ROOT / "locales"
JS = PACK_ROOT / "js"
PAGES = JS / "docs"
LANGUAGES = ("zh", "ja")
LANGUAGES_OF_PAGES = ("zh",)
FILES = ("nodeDefs.json", "main.json")
HIDDEN = "hidden"
OWN_CATEGORY = "quantization"
"""The part of the nodes' category that ComfyUI itself does not translate."""


# --- the English texts


def node_text(info: dict) -> dict:
    """A node's entry of nodeDefs.json, from its entry of /object_info. Names of inputs are without dots."""
    inputs = {}
    for group, specifications in info["input"].items():
        for name, specification in specifications.items():
            options = specification[1] if len(specification) > 1 else {}
            if group != HIDDEN:
                inputs[name] = entry(options.get("display_name") or name, options.get("tooltip"))
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {str(i): entry(*each) for i, each in enumerate(zip(info["output_name"], tooltips, strict=True))}
    texts = {"display_name": info["display_name"], "description": info["description"]}
    return texts | {key: value for key, value in (("inputs", inputs), ("outputs", outputs)) if value}


def entry(name: str, tooltip: str | None) -> dict:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def english(object_info: dict) -> dict[str, dict]:
    """The content of each file of FILES. object_info: of a ComfyUI with the pack."""
    nodes = {name: node_text(info) for name, info in object_info.items() if name.startswith("StochasticFP8")}
    return {"nodeDefs.json": nodes, "main.json": {"nodeCategories": {OWN_CATEGORY: OWN_CATEGORY}}}


# --- the panels' texts


def panel_texts() -> dict:
    """The English texts of js/words.js: key -> text, or [text for one, text for all others]."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("words.js", "translations.js"):
            shutil.copy(JS / name, folder)
        Path(folder, "package.json").write_text('{"type": "module"}')  # older versions of node need it
        script = 'import("./words.js").then(({ WORDS }) => console.log(JSON.stringify(WORDS.en)))'
        done = subprocess.run(["node", "--eval", script], cwd=folder, check=True, capture_output=True)
    return json.loads(done.stdout)


def write_panel_texts(translations: dict[str, dict]) -> None:
    """translations: language -> key -> text."""
    table = json.dumps(translations, indent=2, ensure_ascii=False)
    text = f"// Made from locales/*.po by `make locales`.\n// prettier-ignore\nexport const TRANSLATIONS = {table};\n"
    (JS / "translations.js").write_text(text, encoding="utf-8", newline="\n")


def read_panel_texts() -> dict[str, dict]:
    text = (JS / "translations.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


# --- catalogues


def texts_of(tree: dict, path: tuple = ()) -> Iterator[tuple[str, str | list[str]]]:
    """(where it stands, text) of each text, such as ("StochasticFP8Save.inputs.clip.tooltip", "A text …")."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts_of(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def message_id(text: str | list[str]) -> str | tuple[str, ...]:
    """A text as the id of its message in a catalogue. A list: singular and plural."""
    return tuple(text) if isinstance(text, list) else text


def translated(tree: dict, words: dict) -> dict:
    """The tree with its texts replaced by those of words. What has none is left out: the page shows it in English."""
    done = {
        key: translated(value, words) if isinstance(value, dict) else words.get(message_id(value))
        for key, value in tree.items()
    }
    return {key: value for key, value in done.items() if value}


def sources_of(files: dict[str, dict], panels: dict) -> dict[str, dict]:
    """All English texts: those of the files in locales/en, and those of the panels."""
    return {**files, "words.js": {"panel": panels}}


def updated(catalogue: Catalog, sources: dict[str, dict]) -> Catalog:
    """The catalogue with one message per different English text, in the order of the sources."""
    template = Catalog()
    for tree in sources.values():
        for place, text in texts_of(tree):
            template.add(message_id(text), locations=[(place, None)])
    catalogue.update(template, update_creation_date=False)
    catalogue.obsolete.clear()
    return catalogue


def read_catalogue(language: str) -> Catalog:
    with (FOLDER / f"{language}.po").open("rb") as file:
        return read_po(file, locale=language)


def write_catalogue(catalogue: Catalog, language: str) -> None:
    with (FOLDER / f"{language}.po").open("wb") as file:
        write_po(file, catalogue, width=120, include_previous=True)


def messages(catalogue: Catalog) -> list:
    """The catalogue's messages, without its header."""
    return [message for message in catalogue if message.id]


def is_translated(message: Message) -> bool:
    texts = message.string if message.pluralizable else [message.string]
    return all(texts) and not message.fuzzy


def words_of(catalogue: Catalog) -> dict:
    """Id -> translation of the messages that are translated. A list where the language has several plural forms."""
    words = {message.id: message.string for message in messages(catalogue) if is_translated(message)}
    return {key: text if isinstance(text, str) else [*text] if text[1:] else text[0] for key, text in words.items()}


def untranslated(catalogue: Catalog) -> list:
    """The ids of messages that have no translation, or that of an earlier text."""
    return [message.id for message in messages(catalogue) if not is_translated(message)]


# --- files


def read_files(language: str) -> dict[str, dict]:
    return {name: json.loads((FOLDER / language / name).read_text(encoding="utf-8")) for name in FILES}


def write_files(files: dict[str, dict], language: str) -> None:
    (FOLDER / language).mkdir(exist_ok=True)
    for name, tree in files.items():
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        (FOLDER / language / name).write_text(text, encoding="utf-8", newline="\n")


# --- help pages


def english_pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def translated_page(page: Path, language: str) -> Path:
    """Where ComfyUI's page looks for a translation of an English help page."""
    return page.with_suffix("") / f"{language}.md"


def origin_line(page: Path) -> str:
    """The first line of a translation of this English page as it is now."""
    text = page.read_text(encoding="utf-8")
    return f"<!-- {page.name} {hashlib.sha256(text.encode()).hexdigest()[:16]} -->"


def code_in(text: str) -> list[str]:
    """Pictures and `code` in a Markdown page: what no translation changes."""
    return re.findall(r"(?<=\]\()[^)]+|`[^`]+`", text)


def main() -> int:
    with tempfile.TemporaryDirectory() as base, ComfyUIServer(base, with_test_nodes=False) as server:
        files = english(server.object_info())
    write_files(files, "en")
    panels, missing = panel_texts(), 0
    translations = {}
    for language in LANGUAGES:
        catalogue = updated(read_catalogue(language), sources_of(files, panels))
        write_catalogue(catalogue, language)
        words = words_of(catalogue)
        write_files({name: translated(tree, words) for name, tree in files.items()}, language)
        translations[language] = translated(panels, words)
        for text in untranslated(catalogue):
            missing += 1
            print(f"locales/{language}.po: to translate: {text}")
    write_panel_texts(translations)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
