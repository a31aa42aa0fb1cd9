"""Which files the nodes read and write: names that ComfyUI's loaders list, never paths."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
from comfy.cli_args import args

OUTPUT_FOLDERS = {"diffusion_models": "diffusion_models", "checkpoints": "checkpoints", "text_encoders": "clip"}
"""Kind of model -> the folder under output/ that ComfyUI's loader of that kind lists as well."""


def list_sources() -> list[str]:
    """Every .safetensors file of the kinds above, as `kind/name`."""
    return [
        f"{kind}/{name}"
        for kind in OUTPUT_FOLDERS
        for name in folder_paths.get_filename_list(kind)
        if name.endswith(".safetensors")
    ]


def find_source(source: str) -> tuple[str, Path]:
    """(kind, path) of a name from list_sources. Raises FileNotFoundError."""
    kind, _, name = source.partition("/")
    if kind not in OUTPUT_FOLDERS:
        raise FileNotFoundError(f"{source}: the name begins with one of {', '.join(OUTPUT_FOLDERS)}")
    return kind, Path(folder_paths.get_full_path_or_raise(kind, name))


def fingerprint(source: str) -> str:
    """Changes whenever the file does."""
    try:
        status = find_source(source)[1].stat()
    except FileNotFoundError:
        return "missing"
    return f"{status.st_mtime_ns}:{status.st_size}"


def target_path(kind: str, filename_prefix: str, overwrite: bool = False) -> Path:
    """Where to write: `<prefix>.safetensors` if it may be overwritten, else the next `<prefix>_00001_.safetensors`.

    Raises an Exception (ComfyUI's) for a prefix that leads out of the output folder.
    """
    folder = OUTPUT_FOLDERS[kind]
    prefix = filename_prefix.strip().removesuffix(".safetensors").removeprefix(f"{folder}/") or "stochastic_fp8"
    output = folder_paths.get_output_directory()
    where, name, counter, _, _ = folder_paths.get_save_image_path(f"{folder}/{prefix}", output)
    Path(where).mkdir(parents=True, exist_ok=True)
    return Path(where, f"{name}.safetensors" if overwrite else f"{name}_{counter:05}_.safetensors")


def loader_name(kind: str, path: Path) -> str:
    """The name under which ComfyUI's loader lists a file of target_path."""
    return path.relative_to(Path(folder_paths.get_output_directory(), OUTPUT_FOLDERS[kind])).as_posix()


def workflow_metadata(hidden) -> dict[str, str]:
    """The prompt and the workflow, as ComfyUI's own save nodes store them; nothing with --disable-metadata."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in entries.items() if value is not None}
