"""The files that nodes read and write, by the names that ComfyUI's loaders list and never by path."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

import comfy.quant_ops
import folder_paths
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.errors import CheckpointError, StochasticFP8Error
from ..kernels.files.reader import Source, is_safetensors, shard, source_files
from ..kernels.selection.components import Components
from ..kernels.selection.foreign import diffusers_model, foreign_kind
from ..kernels.selection.presets import DIFFUSION, TEXT_ENCODER
from ..kernels.state_dict.compatibility import is_new
from .demo import MODELS
from .published_names import is_detected

OUTPUT_FOLDERS = {"diffusion_models": "diffusion_models", "checkpoints": "checkpoints", "text_encoders": "clip"}
"""Kind of model -> the folder under output/ that ComfyUI's loader of that kind lists as well."""

DEMO_FILES = {
    "demo/tiny_sd3_landscapes.safetensors": "diffusion_models",
    "demo/tiny_t5.safetensors": "text_encoders",
    "demo/damaged_fp8.safetensors": "diffusion_models",
}
"""Files that ship with the pack, for the example workflows -> kind of each. No loader of ComfyUI lists them."""

DEFAULT_PREFIX = "stochastic_fp8"
"""The name of a file whose prefix gives none."""

TOKENS = "%model%_%format%"
"""The default prefix of the nodes that make a quantized model. See fill_tokens."""

LONGEST_NAME = 200
"""Bytes of one part of a prefix. File systems allow 255 with the number, the ending and a temporary ending."""

NO_NAME = '<>:"|?*' if os.name == "nt" else ""
"""Characters that file names cannot have, beside control characters."""

_given: dict[str, set[str]] = {}
"""The id of the running prompt -> the paths it was given to overwrite."""


class PrefixError(StochasticFP8Error, ValueError):
    """A filename_prefix that names no file in its folder."""


def list_sources() -> list[str]:
    """Every safetensors file of these kinds, as `kind/name`, then DEMO_FILES. A set is listed once, as its index."""
    return [f"{kind}/{name}" for kind in OUTPUT_FOLDERS for name in _models(kind)] + list(DEMO_FILES)


def is_listed(source: str) -> bool:
    """Whether ComfyUI's loaders list a file of this name, or list_sources does."""
    kind, _, name = source.partition("/")
    if kind not in OUTPUT_FOLDERS:
        return source in DEMO_FILES
    return name in folder_paths.get_filename_list(kind) or name in _models(kind)


def _models(kind: str) -> list[str]:
    """ComfyUI lists the files of a set, but not the index beside them."""

    @cache
    def exists(index: str) -> bool:
        return folder_paths.get_full_path(kind, index) is not None

    models = {}
    for name in filter(is_safetensors, folder_paths.get_filename_list(kind)):
        part = shard(name)
        models[next(filter(exists, part.indices if part else ()), name)] = True
    return list(models)


def find_source(source: str) -> tuple[str, Path]:
    """(kind, path) of a name from list_sources. Raises FileNotFoundError."""
    kind, _, name = source.partition("/") if isinstance(source, str) else ("", "", "")
    if name and source in DEMO_FILES:
        return DEMO_FILES[source], MODELS / name
    if kind not in OUTPUT_FOLDERS:
        folders = ", ".join(f"{kind}/" for kind in OUTPUT_FOLDERS)
        raise FileNotFoundError(f"{source}: not a model file that ComfyUI lists; its name must begin with {folders}")
    return kind, Path(folder_paths.get_full_path_or_raise(kind, name))


def fingerprint(source: str) -> str:
    """A text that changes when the file with this name from list_sources changes, or a file of the set."""
    try:
        path = find_source(source)[1]
    except FileNotFoundError:
        return path_fingerprint(None)
    try:
        files = dict.fromkeys([path, *source_files(path)])
    except CheckpointError:  # which a run will raise
        files = {path: None}
    return " ".join(path_fingerprint(file if file.is_file() else None) for file in files)


def path_fingerprint(path: str | Path | None) -> str:
    """A text that changes when the file at this path changes. path: None for a missing file."""
    if path is None:
        return "missing"
    status = Path(path).stat()
    return f"{status.st_mtime_ns}:{status.st_size}"


def fill_tokens(filename_prefix: str, model: str, formats: Iterable[str]) -> str:
    """A prefix with the names of a model and of its formats in place of %model% and %format%.

    model: a name, or that of a file, whose ending is left out. formats: of the quantized layers. Other tokens, such as
    %year%, are left to ComfyUI. So is a value that is not a string: check_prefix refuses it.
    """
    names = {"%model%": _without_ending(model), "%format%": "_".join(sorted(set(formats))) or "16bit"}
    if not isinstance(filename_prefix, str):
        return filename_prefix
    return re.sub("|".join(names), lambda token: names[token[0]], filename_prefix)


def _without_ending(file: str) -> str:
    stem, ending = os.path.splitext(file.removesuffix(".index.json"))
    return stem if ending.lower() in (*folder_paths.supported_pt_extensions, ".gguf") else file


def target_path(kind: str, filename_prefix: str, overwrite: bool = False) -> Path:
    """new_path in the folder that ComfyUI's loader of this kind lists."""
    return new_path(OUTPUT_FOLDERS[kind], filename_prefix, overwrite=overwrite)


def new_path(folder: str, filename_prefix: str, default: str = DEFAULT_PREFIX, overwrite: bool = False) -> Path:
    """The path to write to: `<prefix>.safetensors` with `overwrite`, else the next free `<prefix>_00001_.safetensors`.

    folder: a folder under output/, which the prefix may begin with. default: the name of a prefix that is empty or ends
    with a slash. Creates missing folders. Raises PrefixError.
    """
    prefix = check_prefix(folder, filename_prefix, default)
    root = output_folder(folder)
    try:
        where, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
        _check_inside(root, Path(where), filename_prefix)  # again: ComfyUI has replaced %year% and the like
        Path(where).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(filename_prefix, f"cannot be used: {error.strerror or error}") from error
    target = (
        _once(Path(where, f"{name}.safetensors")) if overwrite else Path(where, f"{name}_{counter:05}_.safetensors")
    )
    _check_inside(root, target, filename_prefix)  # overwriting writes through a link
    return target


def _once(target: Path) -> Path:
    """The path; with a number where the running prompt has been given it before. One of its files would replace another
    without a word: two nodes with one name, or a node that saves a list of models."""
    context = get_executing_context()
    if context is None:
        return target
    if context.prompt_id not in _given:
        _given.clear()  # prompts run one after another
    given, free, number = _given.setdefault(context.prompt_id, set()), target, 1
    while os.path.normcase(free) in given:
        number += 1
        free = target.with_stem(f"{target.stem}_{number}")
    given.add(os.path.normcase(free))
    return free


def check_prefix(folder: str, filename_prefix: str, default: str = DEFAULT_PREFIX) -> str:
    """The prefix relative to a folder under output/, with `/` between its parts. Changes nothing on the disk.

    Raises PrefixError: a prefix that leads out of the folder (absolute, with a drive, through `..` or a link), a part
    that is too long or has control characters, and a value that is not a string.
    """
    if not isinstance(filename_prefix, str):
        raise _refused(filename_prefix, "is not text: give a name")
    text = filename_prefix.strip().replace("\\", "/").removesuffix(".safetensors")
    leads_out = f"leads out of output/{folder}: give a name, or subfolder/name"
    if PureWindowsPath(text).anchor:
        raise _refused(filename_prefix, leads_out)
    if any(character in NO_NAME or unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise _refused(filename_prefix, "has characters that a file name cannot have: give a name without them")
    parts: list[str] = []
    for part in text.split("/"):
        if part.strip(". "):
            parts.append(part)
        elif ".." in part:  # Windows ignores blanks and dots at the end of a name
            if part != ".." or not parts:
                raise _refused(filename_prefix, leads_out)
            parts.pop()
    if not part.strip(". "):
        parts.append(default)
    if parts[0] == folder and len(parts) > 1:
        parts.pop(0)
    if any(len(part.encode()) > LONGEST_NAME for part in parts):
        raise _refused(filename_prefix, f"is too long: each part may have {LONGEST_NAME} bytes")
    root = output_folder(folder)
    _check_inside(root, root.joinpath(*parts[:-1]), filename_prefix)
    return "/".join(parts)


def prefix_problem(filename_prefix: str | None, folders: Iterable[str]) -> str | None:
    """What is wrong with a prefix in all of these folders under output/; None if one of them can use it.

    None as prefix: it is linked, and known only during the run.
    """
    problem = None
    for folder in folders:
        try:
            if filename_prefix is not None:
                check_prefix(folder, filename_prefix)
            return None
        except PrefixError as error:
            problem = problem or str(error)
    return problem


def check_entries(layout: str, formats: Iterable[str]) -> None:
    """Raises CheckpointError where the running ComfyUI, though new, has no E5M2. Its version does not tell."""
    unknown = [format for format in formats if format not in comfy.quant_ops.QUANT_ALGOS]
    if layout == "native" and unknown and is_new(COMFYUI_VERSION):
        raise CheckpointError(
            f"ComfyUI {COMFYUI_VERSION} would not load this file: it has no {unknown[0]}. Choose float8_e4m3fn, update "
            "ComfyUI, or turn on for_another_comfyui to write it for another installation"
        )


def check_detected(source: Source, components: Components) -> None:
    """Raises CheckpointError for a diffusion model of a known family that the running ComfyUI does not know yet.

    What no ComfyUI recognises has errors of its own: wrong prefixes, diffusers layouts, files that are not models.
    """
    tensors, main = source.tensors, components.main
    if main.preset.kind != DIFFUSION or main.family == "unknown" or components.undetected_prefix:
        return
    if diffusers_model(tensors) or foreign_kind(tensors, source.path.name):
        return
    if not is_detected(tensors, source.metadata):
        raise CheckpointError(
            f"{source.name}: ComfyUI {COMFYUI_VERSION} does not recognise this model ({main.preset.title}). Update "
            "ComfyUI, or turn on for_another_comfyui to write the file for another installation"
        )


def check_folder(kind: str, source: Source, components: Components) -> None:
    """Raises CheckpointError for a model of a known family in a folder whose loader cannot use it. kind: as in
    find_source."""
    main = components.main
    if main.family == "unknown" or foreign_kind(source.tensors, source.path.name):
        return
    folder = {
        (DIFFUSION, "text_encoders"): "diffusion_models",
        (TEXT_ENCODER, "diffusion_models"): "text_encoders",
        (TEXT_ENCODER, "checkpoints"): "text_encoders",
    }.get((main.preset.kind, kind))
    if folder:
        raise CheckpointError(
            f"{source.name}: the loader of models/{kind} cannot use this {main.preset.kind} ({main.preset.title}). "
            f"Move the file to models/{folder}, or turn on for_another_comfyui to write it for another installation"
        )


def loader_name(kind: str, path: Path) -> str:
    """The name under which ComfyUI's loader lists a file of target_path."""
    return path.relative_to(output_folder(OUTPUT_FOLDERS[kind])).as_posix()


def output_folder(folder: str) -> Path:
    """The absolute path of a folder under output/."""
    return Path(os.path.abspath(folder_paths.get_output_directory()), folder)


def _check_inside(root: Path, folder: Path, filename_prefix: str) -> None:
    """Raises PrefixError for a folder or file that a link leads out of `root`. `root` itself may be a link."""
    try:
        inside = folder.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise _refused(filename_prefix, f"cannot be used: {error}") from error
    if not inside:
        raise _refused(filename_prefix, f"leads out of output/{root.name} through a link: give another folder")


def _refused(filename_prefix: object, text: str) -> PrefixError:
    return PrefixError(f"filename_prefix {_shown(filename_prefix)} {text}")


def _shown(value: object) -> str:
    """The value in quotes, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def workflow_metadata(hidden: Any) -> dict[str, str]:
    """The prompt and the workflow, as ComfyUI's own save nodes store them; empty with --disable-metadata.

    hidden: what ComfyUI knows of the run; None outside an execution.
    """
    if args.disable_metadata or hidden is None:
        return {}
    entries = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in entries.items() if value is not None}
