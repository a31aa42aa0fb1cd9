"""Calibration in the graph: what a MODEL's layers are fed while ComfyUI samples with it, and its file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import comfy.samplers
import folder_paths
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io

import nodes as comfy_nodes

from ..kernels.calibration.file import load_calibration, save_calibration
from ..kernels.calibration.recorder import ActivationRecorder
from ..kernels.report.table import describe_bytes, number_of
from .models import diffusion_network
from .networks import Network
from .options import LARGEST_SEED
from .schema import CATEGORY, FP8Calibration, fit

log = logging.getLogger("stochastic_fp8")

FOLDER = "fp8_calibrations"
"""The folder under output/, and under models/, that Load FP8 Calibration lists."""


MOST_ROWS = 4096
"""Of what a layer is fed at once, for a large picture, a video or a batch, at most so many places are recorded:
neighbours are alike, and over the steps of a run there are rows enough."""


@contextmanager
def observing(network: Network, observer: ActivationRecorder) -> Iterator[None]:
    """Let an observer see the inputs of every Linear of a network, by tensor key, until the block ends."""

    def hook_of(key: str):
        def see(module, arguments, keywords):
            throw_exception_if_processing_interrupted()
            observer.observe(key, arguments[0] if arguments else keywords["input"])

        return see

    with ExitStack() as hooks:
        for name in sorted(network.linear_names):
            module = network.module.get_submodule(name)
            hook = module.register_forward_pre_hook(hook_of(f"{name}.weight"), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


class StochasticFP8Calibrate(io.ComfyNode):
    """Renders, and records the second moment of what each Linear is fed."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8Calibrate",
            display_name="FP8 Calibration",
            category=CATEGORY,
            search_aliases=["calibrate", "gptq", "activations", "fp8"],
            description=(
                "Renders a few images with your model and records what flows into its layers. Connected to a quantize "
                "node whose rounding is calibrated, it cuts the loss of FP8 to about a third, at the same file size. "
                "Use prompts and settings like those you will use, 8 images or more; chain several of these nodes for "
                "several prompts."
            ),
            inputs=[
                fit(io.Model.Input, "model", tooltip="The model that will be quantized, in 16 bits, LoRAs included."),
                fit(io.Conditioning.Input, "positive", tooltip="What to render: a prompt like those you will use."),
                fit(io.Conditioning.Input, "negative", tooltip="What to leave out, as in KSampler."),
                fit(io.Latent.Input, "latent_image", tooltip="Size and number of the images, as in KSampler."),
                fit(
                    io.Int.Input,
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="The noise of the first run; each further run takes the next seed.",
                ),
                fit(io.Int.Input, "steps", default=20, min=1, max=10000, tooltip="As you will render later."),
                fit(
                    io.Float.Input,
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="As you will render later.",
                ),
                fit(
                    io.Combo.Input,
                    "sampler_name",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    tooltip="As you will render later; most samplers see the same inputs.",
                ),
                fit(
                    io.Combo.Input,
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    tooltip="As you will render later.",
                ),
                fit(
                    io.Float.Input,
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 renders from pure noise, less keeps part of the latent.",
                ),
                fit(
                    io.Int.Input,
                    "runs",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="How many times to render. More runs know the layers better; beyond 8 little is gained.",
                ),
                fit(
                    FP8Calibration.Input,
                    "calibration",
                    optional=True,
                    tooltip="An earlier calibration of the same model, e.g. with another prompt, to add to.",
                ),
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION",
                    display_name="calibration",
                    tooltip="Connect it to a quantize node, to another FP8 Calibration, or to Save FP8 Calibration.",
                ),
                io.Latent.Output(id="LATENT", display_name="latent", tooltip="The last run's images, to look at."),
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
        observer = ActivationRecorder(most_rows=MOST_ROWS)
        network = diffusion_network(model)
        with observing(network, observer):
            for run in range(runs):
                log.info("calibration run %d of %d", run + 1, runs)
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
        seen = observer.result(f"{type(model.model).__name__}, {number_of(runs, 'run')} of {number_of(steps, 'step')}")
        missed = len(network.linear_names) - len(seen.layers)
        log.info("%s: %d layers seen, %d not, %s", seen.source, len(seen.layers), missed, describe_bytes(seen.nbytes))
        return io.NodeOutput(calibration + seen if calibration else seen, latent)


class StochasticFP8SaveCalibration(io.ComfyNode):
    """FP8_CALIBRATION -> a file under output/fp8_calibrations."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8SaveCalibration",
            display_name="Save FP8 Calibration",
            category=CATEGORY,
            description=f"Writes a calibration to output/{FOLDER}, so that it need not be made again.",
            inputs=[
                fit(FP8Calibration.Input, "calibration", tooltip="What FP8 Calibration recorded."),
                fit(
                    io.String.Input,
                    "filename_prefix",
                    default="calibration",
                    tooltip="The file's name, which gets a number.",
                ),
            ],
            outputs=[
                io.String.Output(
                    id="filename", display_name="filename", tooltip="The file's name as Load FP8 Calibration lists it."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration, filename_prefix):
        output = folder_paths.get_output_directory()
        prefix = filename_prefix.strip().removesuffix(".safetensors") or "calibration"
        where, name, counter, _, _ = folder_paths.get_save_image_path(f"{FOLDER}/{prefix}", output)
        target = Path(where, f"{name}_{counter:05}_.safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_calibration(calibration, target)
        return io.NodeOutput(target.relative_to(Path(output, FOLDER)).as_posix())


class StochasticFP8LoadCalibration(io.ComfyNode):
    """A file -> FP8_CALIBRATION, read a layer at a time when it is used."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8LoadCalibration",
            display_name="Load FP8 Calibration",
            category=CATEGORY,
            description=f"Reads a calibration from output/{FOLDER} or models/{FOLDER}.",
            inputs=[
                fit(
                    io.Combo.Input,
                    "calibration_name",
                    options=list_calibrations(),
                    tooltip="A file of Save FP8 Calibration, made with the model that will be quantized.",
                )
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION", display_name="calibration", tooltip="Connect it to a quantize node."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name):
        path = folder_paths.get_full_path(FOLDER, calibration_name)
        if path is None:
            return "missing"
        status = Path(path).stat()
        return f"{status.st_mtime_ns}:{status.st_size}"

    @classmethod
    def execute(cls, calibration_name):
        return io.NodeOutput(load_calibration(folder_paths.get_full_path_or_raise(FOLDER, calibration_name)))


def list_calibrations() -> list[str]:
    """Every calibration file, after telling ComfyUI of the folders, which is harmless when it knows them."""
    for parent in (folder_paths.get_output_directory(), folder_paths.models_dir):
        folder_paths.add_model_folder_path(FOLDER, str(Path(parent, FOLDER)))
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
