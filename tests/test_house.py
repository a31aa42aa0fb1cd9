"""The pack as a whole: its metadata, its versions, who imports whom, and what the registry asks for."""

import ast
import asyncio
import re
import subprocess
import sys

import pytest
import stochastic_fp8_pack
import tomllib
from conftest import PACK_NAME, PACK_ROOT

REGISTRY_RULES = "S102,S307,E702"

ROOMS = (
    "version",
    "display",
    "errors",
    "choices",
    "progress",
    "numerics",
    "files",
    "selection",
    "calibration",
    "state_dict",
    "recipe",
    "report",
    "engine",
    "studies",
    "figures",
    "command",
)
"""The folders and modules of kernels/, bottom first. A room imports only from itself and from rooms before it."""

DOORS = {"__init__", "__main__"}
"""Modules of kernels/ above all rooms: they may import any room, and no room imports them."""


def pyproject():
    return tomllib.loads((PACK_ROOT / "pyproject.toml").read_text())


def relative_imports(path):
    """(line, parts of the imported module's path from the pack's root) of each relative import, wherever it stands."""
    package = path.relative_to(PACK_ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            if node.module:
                yield node.lineno, (*start, *node.module.split("."))
            else:
                yield from ((node.lineno, (*start, alias.name)) for alias in node.names)


def modules(folder):
    return sorted((PACK_ROOT / folder).rglob("*.py"))


def upward_imports(path):
    """The imports of a module of kernels/ that break the order of ROOMS, as readable lines."""
    room = path.relative_to(PACK_ROOT / "kernels").with_suffix("").parts[0]
    for line, imported in relative_imports(path):
        target = imported[1] if imported[0] == "kernels" and len(imported) > 1 else "__init__"
        allowed = ROOMS if room in DOORS else ROOMS[: ROOMS.index(room) + 1]
        if imported[0] != "kernels" or target not in allowed:
            yield f"{path.relative_to(PACK_ROOT)}:{line} imports {'.'.join(imported)}"


def test_every_room_is_in_the_list():
    """A new folder or module of kernels/ needs a place in ROOMS."""
    found = {path.stem for path in (PACK_ROOT / "kernels").iterdir() if path.suffix == ".py"}
    found |= {path.parent.name for path in (PACK_ROOT / "kernels").glob("*/__init__.py")}
    assert found - DOORS == set(ROOMS)


def test_no_import_runs_upwards():
    """Imports inside functions and under TYPE_CHECKING count too."""
    assert [line for path in modules("kernels") for line in upward_imports(path)] == []


def test_the_library_never_imports_comfyui():
    forbidden = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
    found = []
    for path in modules("kernels"):
        for node in ast.walk(ast.parse(path.read_text(), path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{path}:{node.lineno}: {name}" for name in names if name.split(".")[0] in forbidden]
    assert found == []


def test_nodes_import_only_nodes_and_the_library():
    for path in modules("nodes"):
        assert {imported[0] for _, imported in relative_imports(path)} <= {"nodes", "kernels"}, path


def test_the_check_of_imports_sees_an_upward_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACK_ROOT", tmp_path)
    path = tmp_path / "kernels" / "files" / "reader.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    from ..engine.job import x\n    from .. import Recipe\n    from ..errors import E\n")
    assert list(upward_imports(path)) == [
        "kernels/files/reader.py:2 imports kernels.engine.job",
        "kernels/files/reader.py:3 imports kernels.Recipe",
    ]


def test_registry_rules_are_clean():
    """No exec, no eval, no two statements on a line; ``noqa`` does not count."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--select", REGISTRY_RULES]
    done = subprocess.run([*command, PACK_ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_root_module_holds_only_what_comfyui_reads():
    public = {name for name in vars(stochastic_fp8_pack) if not name.startswith("_")}
    assert public - {"kernels", "nodes"} == {"WEB_DIRECTORY", "comfy_entrypoint"}
    assert stochastic_fp8_pack.WEB_DIRECTORY == "./js"
    assert asyncio.iscoroutinefunction(stochastic_fp8_pack.comfy_entrypoint)


def test_the_library_imports_neither_comfyui_nor_matplotlib():
    """In a process of its own: other tests may have imported more by now."""
    code = (
        "import sys, conftest\n"
        f"from {PACK_NAME} import kernels\n"
        "assert kernels.quantize_tensor\n"
        f"unwanted = {{'comfy', 'folder_paths', '{PACK_NAME}.nodes', 'matplotlib'}} & set(sys.modules)\n"
        "assert not unwanted, unwanted\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK_ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pack_root_is_not_on_the_path():
    """On the path, the pack's ``nodes`` would hide ComfyUI's."""
    assert str(PACK_ROOT) not in sys.path


def test_project_metadata():
    project = pyproject()
    assert project["project"]["name"] == "stochastic-fp8"
    assert project["tool"]["comfy"]["DisplayName"] == "Stochastic FP8"
    requirements = (PACK_ROOT / "requirements.txt").read_text().split()
    assert requirements == project["project"]["dependencies"] == ["matplotlib"]


def test_there_is_one_version():
    from stochastic_fp8_pack.kernels.version import VERSION

    assert pyproject()["project"]["version"] == VERSION


def constant(module, name):
    """The value of a number in a module, which is not imported: nodes need ComfyUI."""
    for node in ast.parse((PACK_ROOT / module).read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            value = node.value
            if isinstance(value, ast.BinOp) and isinstance(value.op, ast.LShift):
                return value.left.value << value.right.value
            return ast.literal_eval(value)
    raise AssertionError(f"{module} has no {name}: update this test and .github/SECURITY.md")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kernels/files/header.py", "MAX_HEADER"),
        ("kernels/files/header.py", "MAX_TENSORS"),
        ("kernels/files/header.py", "MAX_NAME"),
        ("kernels/files/header.py", "MAX_ENTRY"),
        ("kernels/files/header.py", "MAX_METADATA"),
        ("kernels/files/bounded_json.py", "MAX_JSON"),
        ("kernels/files/bounded_json.py", "MAX_VALUES"),
        ("kernels/state_dict/markings.py", "MAX_INLINE"),
        ("kernels/state_dict/markings.py", "MAX_ALL_INLINE"),
        ("kernels/calibration/file.py", "MOST_INPUTS"),
        ("kernels/selection/patterns.py", "LONGEST_PATTERNS"),
        ("nodes/routes.py", "MAX_BODY"),
        ("nodes/routes.py", "MAX_TEXT_LENGTH"),
    ],
)
def test_the_security_page_states_the_limits(module, name):
    text = (PACK_ROOT / ".github" / "SECURITY.md").read_text()
    assert re.search(rf"\b{constant(module, name):,}\b", text), f"SECURITY.md does not state {name} of {module}"


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_the_oldest_python_is_checked(tool):
    """ruff and mypy check against the oldest Python that pyproject.toml promises."""
    project = pyproject()
    oldest = project["project"]["requires-python"].removeprefix(">=")
    checked = {"ruff": project["tool"]["ruff"]["target-version"], "mypy": project["tool"]["mypy"]["python_version"]}
    assert checked[tool].removeprefix("py").replace(".", "") == oldest.replace(".", "")
