"""Save Scaled FP8 Model: writes what is sampled, byte for byte, where ComfyUI's loaders find it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from comfy_api.latest import io, ui
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels import display
from ..kernels.choices import choose
from ..kernels.engine.measured_choice import GB
from ..kernels.engine.quantization import RECIPE_ENTRY
from ..kernels.errors import CheckpointError
from ..kernels.selection.components import Components
from ..kernels.state_dict.compatibility import EXACT, check_usable, layout_verdicts, verdict_of
from ..kernels.state_dict.layouts import LAYOUTS
from ..kernels.state_dict.scaled_state_dict import ScaledStateDict
from ..kernels.state_dict.size import METADATA_BYTES, metadata_bytes, state_dict_bytes
from ..kernels.state_dict.write import write_state_dict
from . import models
from .files import (
    OUTPUT_FOLDERS,
    TOKENS,
    check_entries,
    check_prefix,
    fill_tokens,
    loader_name,
    prefix_problem,
    target_path,
    workflow_metadata,
)
from .live import files_output
from .networks import ModelError, Network, beside_tensors, narrow
from .options import another_comfyui_input, filename_output, layout_input
from .progress import JobProgress, show_text
from .running import source_name
from .schema import CATEGORY, newer

log = logging.getLogger("stochastic_fp8")


def model_contents(model) -> ScaledStateDict:
    """A diffusion model alone, under its bare names."""
    network = models.diffusion_network(model)
    _check_quantized([network], "MODEL", "Stochastic FP8")
    contents = network.saved_state_dict()
    contents.add_tensors(models.sampling_keys(model) | beside_tensors(model))
    return contents


def text_contents(clip) -> dict[str, ScaledStateDict]:
    """Each quantized text encoder by its name, under the names that CLIPLoader reads."""
    networks = models.text_networks(clip)
    _check_quantized(networks.values(), "CLIP", "Stochastic FP8 Text Encoder")
    found = {}
    for name, network in networks.items():
        if network.scaled:
            found[name] = network.saved_state_dict()
            found[name].add_tensors(models.tokenizer_tensors(clip))
        else:
            log.info("%s is not quantized and is not saved: use the file it came from", name)
    return found


def checkpoint_contents(model, clip, vae) -> ScaledStateDict:
    """An all-in-one checkpoint, under the names of the model's family."""
    network = models.diffusion_network(model)
    _check_quantized([network], "MODEL", "Stochastic FP8")
    contents = ScaledStateDict(metadata=network.metadata)
    contents.add(network.saved_state_dict(), models.diffusion_prefix(model))
    contents.add_tensors(models.sampling_keys(model) | beside_tensors(model))
    if clip is not None:
        scaled = []
        for encoder in models.text_networks(clip).values():
            _check_savable(encoder, "CLIP")
            if encoder.scaled:
                scaled.append(encoder)
                state = encoder.under_module_names(encoder.saved_state_dict())
                contents.add(state, models.text_encoder_prefix(model, encoder))
        contents.add_tensors(models.plain_text_tensors(model, clip, without=scaled))
    if vae is not None:
        contents.add_tensors({name: narrow(tensor) for name, tensor in models.vae_tensors(model, vae).items()})
    return contents


class StochasticFP8Save(io.ComfyNode):
    """A quantized MODEL, CLIP or both -> a file under output/."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Save",
            display_name="Save Scaled FP8 Model",
            category=CATEGORY,
            search_aliases=["save fp8", "export fp8", "save checkpoint", "save quantized model"],
            description=(
                "Saves a quantized model without rounding it again: loaded back, it gives the same image, bit for "
                "bit. A model alone goes to output/diffusion_models. With a text encoder or a VAE, it becomes one "
                "checkpoint in output/checkpoints. A text encoder alone goes to output/clip. ComfyUI's loaders list "
                "all three folders."
            ),
            inputs=[
                io.String.Input(
                    "filename_prefix",
                    default=TOKENS,
                    tooltip="The name of the file. %model% stands for the name of the model's file, %format% for the "
                    "format. A number is added, unless overwrite is on.",
                ),
                layout_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model from Stochastic FP8, or one loaded from a scaled FP8 file.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder to save, alone or with the model."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE for an all-in-one checkpoint. It is not changed."),
                another_comfyui_input(),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replaces an earlier file of this name, once the new one is complete and verified.",
                ),
            ],
            outputs=[filename_output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem(filename_prefix, OUTPUT_FOLDERS.values()) or True

    @classmethod
    def execute(
        cls, filename_prefix, layout, model=None, clip=None, vae=None, for_another_comfyui=False, overwrite=False
    ):
        choose(LAYOUTS, layout, "layout")
        if model is None and clip is None:
            raise ModelError("nothing to save: connect a model, a text encoder (clip), or both")
        metadata = workflow_metadata(cls.hidden)
        if model is None:
            owner, kind = clip.patcher, "text_encoders"
        else:
            owner, kind = model, "diffusion_models" if clip is None and vae is None else "checkpoints"
        prefix = check_prefix(OUTPUT_FOLDERS[kind], filename_prefix)
        if kind == "text_encoders":
            files = text_contents(clip)
        else:
            files = {"": model_contents(model) if kind == "diffusion_models" else checkpoint_contents(model, clip, vae)}
        for contents in files.values():
            _check_usable(contents, layout, for_another_comfyui)
        recipe = owner.attachments.get(models.ATTACHMENT)
        if recipe:
            metadata[RECIPE_ENTRY] = json.dumps(recipe | {"layout": layout}, sort_keys=True)
        if recipe and kind == "diffusion_models":
            metadata = _within_limit(files[""], metadata, recipe.get("size_limit", 0))
        saved = {}
        for encoder, filled in _prefixes(prefix, files, model).items():
            path = target_path(kind, filled, overwrite)
            _write(path, files[encoder], layout, metadata, overwrite)
            saved[loader_name(kind, path)] = path
        names = "\n".join(saved)
        shown = {**ui.PreviewText(names).as_dict(), **files_output(OUTPUT_FOLDERS[kind], saved)}
        return io.NodeOutput(names, ui=shown)


def _check_usable(contents: ScaledStateDict, layout: str, for_another_comfyui: bool) -> None:
    """Raises CheckpointError where the running ComfyUI would misread the file, or not load it. Logs its losses."""
    formats = sorted({layer.format for layer in contents.layers})
    infos = {name: entry.info for name, entry in contents.tensors.items()}
    infos |= {name: weight.info for name, weight in contents.weights.items()}
    components = Components(infos)
    if for_another_comfyui:
        verdict = verdict_of(COMFYUI_VERSION, layout_verdicts(layout, formats, components))
    else:
        check_entries(layout, formats)
        try:
            verdict = check_usable(COMFYUI_VERSION, layout, formats, components)
        except ValueError as error:
            raise CheckpointError(f"nothing was saved: {error}") from error
    if verdict.outcome != EXACT:
        log.warning("%s", verdict)


def _within_limit(contents: ScaledStateDict, metadata: dict[str, str], limit: float) -> dict[str, str]:
    """The metadata; without the workflow if it takes the file above the limit, as it can if it grew since quantizing.

    limit: the size in GB for which the layers were chosen; 0: none.
    """
    nbytes = state_dict_bytes(contents) - METADATA_BYTES + metadata_bytes(metadata)
    if not limit or nbytes <= limit * GB:
        return metadata
    warning = f"the workflow is not in the file, which it would make larger than {limit:g} GB; quantize again"
    log.warning("%s", warning)
    show_text(warning)
    return {RECIPE_ENTRY: metadata[RECIPE_ENTRY]}


def _prefixes(prefix: str, files: dict[str, ScaledStateDict], model) -> dict[str, str]:
    """The prefix of each file, with its tokens filled in. Equal ones end in the name of the encoder.

    files: by the name of the encoder; of a model, one file.
    """
    prefixes = {}
    for encoder, contents in files.items():
        name = models.diffusion_network(model).name if model is not None else _encoder_name(encoder)
        prefixes[encoder] = fill_tokens(prefix, name, (layer.format for layer in contents.layers))
    if len(set(prefixes.values())) < len(prefixes):
        return {encoder: f"{filled}_{encoder}" for encoder, filled in prefixes.items()}
    return prefixes


def _encoder_name(encoder: str) -> str:
    """The file of an encoder, if the CLIP's loader names one file or one with the encoder's name; else its name."""
    files = (source_name("clip", "CLIP") or "").split(" + ")
    return files[0] if len(files) == 1 and files[0] else next((file for file in files if encoder in file), encoder)


def _write(path: Path, contents: ScaledStateDict, layout: str, metadata: dict[str, str], overwrite: bool) -> None:
    inspection = write_state_dict(
        contents, path, layout=layout, metadata=metadata, overwrite=overwrite, progress=JobProgress()
    )
    log.info("saved %s: %d scaled FP8 layers, %s", path, inspection.scaled, display.bytes(path.stat().st_size))
    for verdict in inspection.verdicts:
        if verdict.outcome != EXACT:
            log.info("%s", verdict)


def _check_quantized(networks, what: str, node: str) -> None:
    for network in networks:
        _check_savable(network, what)
    kept = any(models.ATTACHMENT in network.patcher.attachments for network in networks)  # all of it, by a limit
    if not kept and not any(network.scaled for network in networks):
        raise ModelError(f"this {what} is not quantized: put {node} before Save Scaled FP8 Model")


def _check_savable(network: Network, what: str) -> None:
    network.check_readable()
    patched = network.patched
    if patched:
        raise ModelError(
            f"a LoRA or another patch changes {len(patched)} weights of this {what} (e.g. '{patched[0]}') after it was "
            "quantized, and saving would round them a second time: move it before Stochastic FP8"
        )
