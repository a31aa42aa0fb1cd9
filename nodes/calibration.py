"""The nodes that record, save and load a calibration: the layer inputs of a MODEL while ComfyUI samples with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui

import nodes as comfy_nodes

from ..kernels import display
from ..kernels.calibration.file import load_calibration, save_calibration
from ..kernels.calibration.gptq import IMAGES
from ..kernels.calibration.mapped import mapped_memory
from ..kernels.calibration.recorder import ActivationRecorder
from .devices import pinned
from .files import new_path, output_folder, path_fingerprint, prefix_problem
from .live import files_output
from .models import diffusion_network
from .networks import Network, own_buffers
from .options import LARGEST_SEED, calibration_input, sampler_inputs, scene_inputs, seed_input
from .progress import JobProgress, one_bar
from .schema import CATEGORY, FP8Calibration, newer

log = logging.getLogger("stochastic_fp8")

FOLDER = "fp8_calibrations"
"""The folder under output/, and under models/, that Load Calibration lists."""

DEFAULT_PREFIX = "calibration"

SHARE_OF_ROOM = 0.8
"""Of the free memory on a GPU, for sums: the rest is for what the estimates do not know."""

HOW_MANY = f"Render {IMAGES} images in total, such as 8 runs of a batch of 4."

MOST_ROWS = 4096
"""Positions of a large image, video or batch that are recorded per step and layer. Neighbours are alike, and further
steps add other positions."""


def new_recorder(inference: int = 0) -> ActivationRecorder:
    """A recorder that keeps sums on the GPU as far as ComfyUI has room, and pins those in main memory. Those that
    cannot be pinned, and the result, lie in temporary files.

    inference: bytes on the GPU that the model needs beside its weights.
    """

    def room(device: torch.device) -> int:
        """Asked while the model runs: its weights are loaded."""
        free = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
        return int(SHARE_OF_ROOM * max(0, free - 2 * inference))

    return ActivationRecorder(most_rows=MOST_ROWS, room=room, pin=pinned, store=stored)


def stored(count: int) -> torch.Tensor:
    """Memory for `count` fp32 numbers in ComfyUI's folder of temporary files, which it empties when it starts."""
    return mapped_memory(Path(folder_paths.get_temp_directory()), count)


@contextmanager
def recording(network: Network, recorder: ActivationRecorder, prefix: str = "") -> Iterator[None]:
    """Record the inputs of every Linear layer of a network, by prefix + tensor key, until the block ends."""

    def hook_of(key: str) -> Callable[[Any, tuple, dict[str, Any]], None]:
        def record(module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
            throw_exception_if_processing_interrupted()
            recorder.observe(key, arguments[0] if arguments else keywords["input"])

        return record

    with ExitStack() as hooks:
        for name in sorted(network.linear_names):
            module = network.owner(f"{name}.weight")
            hook = module.register_forward_pre_hook(hook_of(f"{prefix}{name}.weight"), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


class StochasticFP8Calibrate(io.ComfyNode):
    """Renders with a MODEL and records the second moment of each Linear layer's inputs."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Calibrate",
            display_name="FP8 Calibration",
            category=CATEGORY,
            search_aliases=["calibrate", "gptq", "activations"],
            description=(
                "Renders images with your model and records the inputs of its layers. Connect it to a quantize "
                "node with rounding calibrated: the error of the layers' outputs drops to about a third, at the same "
                f"file size. Use prompts and settings like those you will render with. {HOW_MANY} For several prompts, "
                "chain several of these nodes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will be quantized, in 16 bits, with its LoRAs."),
                *scene_inputs(" Use the size you will render at."),
                seed_input("The noise of the first run. Each further run uses the next seed."),
                *sampler_inputs(),
                io.Int.Input(
                    "runs",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip=f"How many times to render, each time with other noise. {HOW_MANY}",
                ),
                calibration_input("An earlier calibration of this model to add to, e.g. one made with another prompt."),
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION",
                    display_name="calibration",
                    tooltip="The recorded layer inputs. Connect it to a quantize node, to another FP8 Calibration, or "
                    "to Save Calibration.",
                ),
                io.Latent.Output(id="LATENT", display_name="latent", tooltip="The images of the last run, to look at."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        runs,
        calibration=None,
    ):
        network = diffusion_network(model)
        inference = network.patcher.memory_required(list(latent_image["samples"].shape))
        source = f"{type(model.model).__name__}, {display.count(runs, 'run')} of {display.count(steps, 'step')}"
        with new_recorder(inference) as recorder:
            with recording(network, recorder), own_buffers(model), one_bar(runs, "run") as bar:
                for run in range(runs):
                    bar.part = run
                    log.info("calibration: run %d of %d", run + 1, runs)
                    (latent,) = comfy_nodes.common_ksampler(
                        model,
                        (seed + run) % (LARGEST_SEED + 1),
                        steps,
                        cfg,
                        sampler_name,
                        scheduler,
                        positive,
                        negative,
                        latent_image,
                        denoise=denoise,
                    )
            recorded = recorder.result(source)
        log.info(
            "calibration %s: inputs of %d layers recorded (%s), %d Linear layers not used",
            source,
            len(recorded.layers),
            display.bytes(recorded.nbytes),
            len(network.linear_names) - len(recorded.layers),
        )
        return io.NodeOutput(calibration.plus(recorded, stored) if calibration else recorded, latent)


class StochasticFP8SaveCalibration(io.ComfyNode):
    """FP8_CALIBRATION -> a file under output/fp8_calibrations."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8SaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            search_aliases=["save fp8 calibration"],
            description=f"Saves a calibration to output/{FOLDER}, so that you can use it again.",
            inputs=[
                FP8Calibration.Input("calibration", tooltip="What FP8 Calibration recorded."),
                io.String.Input(
                    "filename_prefix",
                    default=DEFAULT_PREFIX,
                    tooltip="The name of the file. A number is added, so that no file is overwritten.",
                ),
            ],
            outputs=[
                io.String.Output(
                    id="filename",
                    display_name="filename",
                    tooltip="The name under which Load Calibration lists the file.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem(filename_prefix, [FOLDER]) or True

    @classmethod
    def execute(cls, calibration, filename_prefix):
        target = new_path(FOLDER, filename_prefix, DEFAULT_PREFIX)
        save_calibration(calibration, target, progress=JobProgress())
        name = target.relative_to(output_folder(FOLDER)).as_posix()
        return io.NodeOutput(name, ui={**ui.PreviewText(name).as_dict(), **files_output(FOLDER, {name: target})})


class StochasticFP8LoadCalibration(io.ComfyNode):
    """A file -> FP8_CALIBRATION. Each layer is read when it is used."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8LoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            search_aliases=["load fp8 calibration"],
            description=f"Loads a calibration from output/{FOLDER} or models/{FOLDER}.",
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=list_calibrations(),
                    tooltip="A file from Save Calibration, made with the model that will be quantized.",
                )
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION",
                    display_name="calibration",
                    tooltip="The recorded layer inputs. Connect it to a quantize node, or to FP8 Calibration to add "
                    "more images.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name):
        return path_fingerprint(folder_paths.get_full_path(FOLDER, calibration_name))

    @classmethod
    def execute(cls, calibration_name):
        return io.NodeOutput(load_calibration(folder_paths.get_full_path_or_raise(FOLDER, calibration_name)))


def list_calibrations() -> list[str]:
    """Every calibration file. Registers the folders with ComfyUI first, which changes nothing if it knows them."""
    for parent in (folder_paths.get_output_directory(), folder_paths.models_dir):
        folder_paths.add_model_folder_path(FOLDER, str(Path(parent, FOLDER)))
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
