"""The front end's JavaScript: unit tests in node's runner, eslint, prettier."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PACK_ROOT

HERE = Path(__file__).parent
SOURCES = ["js/*.js", "tests/js/*.mjs", "tests/browser/*.mjs"]
DISPLAY_CASES = PACK_ROOT / "tests" / "display_cases.json"
TOOLS = PACK_ROOT / ".build" / "node" / "node_modules" / ".bin"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="needs node: tests/tools/environment.py --browser")


def sources():
    return [path for pattern in SOURCES for path in sorted(PACK_ROOT.glob(pattern))]


def check(*command, cwd=PACK_ROOT):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("test", sorted(path.name for path in HERE.glob("*.test.mjs")))
def test_in_node(tmp_path, test):
    """Copied beside a package.json with "type": "module", which older versions of node need."""
    shutil.copytree(PACK_ROOT / "js", tmp_path / "js", ignore=shutil.ignore_patterns("docs"))
    (tmp_path / "tests" / "js").mkdir(parents=True)
    shutil.copy(HERE / test, tmp_path / "tests" / "js")
    shutil.copy(DISPLAY_CASES, tmp_path / "tests")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    check("node", "--test", Path("tests", "js", test), cwd=tmp_path)


def test_eslint_is_clean():
    check(TOOLS / "eslint", "--max-warnings", "0", "--config", HERE / "eslint.config.mjs", *sources())


def test_prettier_is_clean():
    check(TOOLS / "prettier", "--check", "--config", HERE / "prettier.json", *sources())
