"""The node that records a calibration of text encoders: their layer inputs while they read prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..kernels import Recipe, display
from ..kernels.calibration.gptq import MANY_PROMPTS
from ..kernels.calibration.moments import Calibration
from ..kernels.engine.quantization import select
from ..kernels.errors import CalibrationError
from ..kernels.numerics.rounding import CALIBRATED
from . import models
from .calibration import new_recorder, recording, stored
from .in_graph import NetworkJob
from .networks import Network
from .options import calibration_input
from .schema import CATEGORY, FP8Calibration, newer

log = logging.getLogger("stochastic_fp8")

PROMPTS = """\
A weathered fisherman mends a green net on a stone pier at sunrise, gulls circling above, soft golden light on water.
Close-up portrait of a young woman with freckles and curly red hair, looking at the camera, shallow depth of field.
A neon-lit street in Tokyo at night after rain, reflections on the asphalt, people with umbrellas, cinematic.
Oil painting of a sailing ship in a storm, heavy brush strokes, dark clouds, a single lantern burning on deck.
A cozy reading corner with a velvet armchair, a tall bookshelf, a sleeping tabby cat and warm lamp light.
Isometric 3D render of a tiny bakery with striped awnings, bread in the window, pastel colors, studio lighting.
An astronaut riding a white horse across a red desert, two moons in the sky, highly detailed, wide angle.
Watercolor illustration of a fox and a hedgehog having tea under a giant mushroom, children's book style.
Product photo of a glass perfume bottle on wet black slate, water droplets, dramatic rim light, 4k.
A hand-drawn map of an imaginary island with mountains, forests, a dragon and a compass rose, aged parchment.
Aerial view of terraced rice fields in the morning fog, a narrow path winding between them, vivid greens.
A robot chef tossing vegetables in a wok, flames, busy restaurant kitchen, motion blur, photorealistic.
Minimalist poster of a mountain with the text "HIGHER GROUND" in bold white letters, flat design, blue and orange.
Black and white photograph of an old jazz trumpeter on stage, smoke in the spotlight, film grain, 1950s.
A snowy village at Christmas, wooden houses with glowing windows, children building a snowman, aurora in the sky.
Macro photograph of a dragonfly on a blade of grass, compound eyes in sharp focus, bokeh background.
A knight in rusty armor kneels before a glowing sword in a ruined cathedral overgrown with ivy, volumetric light.
Anime girl with silver hair and a school uniform on a rooftop, cherry blossoms in the wind, sunset, detailed background.
Cutaway diagram of a volcano with labels for the magma chamber, vent and crater, clean vector style.
A bowl of steaming ramen with a soft-boiled egg, scallions and nori, chopsticks resting on the rim, food photography.
Art deco skyscraper lobby with marble floors, brass elevators and a geometric ceiling, symmetrical composition.
A golden retriever puppy jumping into a lake, splashing water frozen in time, bright summer day, telephoto.
Surreal scene of a staircase spiraling into the clouds, doors floating in the air, in the style of a dream.
The camera slowly pans over a quiet harbor as boats rock gently, then follows a boy who runs along the dock.
blurry, low quality, watermark, deformed hands, extra fingers, jpeg artifacts"""
"""One prompt per line, of different subjects, styles and lengths. The last one is a typical negative prompt."""


class StochasticFP8CalibrateTextEncoder(io.ComfyNode):
    """Encodes prompts with a CLIP and records the second moment of the inputs of its large encoders' Linear layers."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8CalibrateTextEncoder",
            display_name="Text Encoder Calibration",
            category=CATEGORY,
            search_aliases=["calibrate t5", "calibrate clip", "fp8 calibration", "gptq"],
            description=(
                "Encodes some prompts with your text encoder and records the inputs of its layers. Connect it to "
                "Stochastic FP8 Text Encoder with rounding calibrated. It takes seconds. Use prompts like "
                "those you will write."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that will be quantized, in 16 bits, with its LoRAs."),
                io.String.Input(
                    "prompts",
                    default=PROMPTS,
                    multiline=True,
                    tooltip="One prompt per line. Use prompts like those you will write, in subject, style and length; "
                    f"{MANY_PROMPTS} or more.",
                ),
                calibration_input("An earlier calibration to add to: of this text encoder, or of another one."),
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION",
                    display_name="calibration",
                    tooltip="The recorded layer inputs, by encoder. Connect it to Stochastic FP8 Text "
                    "Encoder, or to Save Calibration.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompts, calibration=None):
        lines = prompt_lines(prompts)
        networks = quantizable_networks(clip)
        names = " + ".join(network.name for network in networks)
        bar = ProgressBar(len(lines))
        with new_recorder() as recorder, ExitStack() as recordings:
            for network in networks:
                recordings.enter_context(recording(network, recorder, _prefix(network)))
            for line in lines:
                throw_exception_if_processing_interrupted()
                clip.encode_from_tokens(clip.tokenize(line))
                bar.update(1)
            recorded = recorder.result(f"{names}, {display.count(len(lines), 'prompt')}")
        log.info("calibration %s: inputs of %d layers recorded", recorded.source, len(recorded.layers))
        return io.NodeOutput(calibration.plus(recorded, stored) if calibration else recorded)


def prompt_lines(text: str) -> list[str]:
    """The prompts of a text box, one per line. Raises CalibrationError if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise CalibrationError(f"prompts is empty: write at least one prompt, better {MANY_PROMPTS}, one per line")
    return lines


def quantizable_networks(clip) -> list[Network]:
    """The encoders of a CLIP that Stochastic FP8 Text Encoder quantizes.

    Raises CalibrationError if there is none: CLIP-L and CLIP-G are never quantized.
    """
    networks = list(models.text_networks(clip).values())
    found = [network for network in networks if select(network, Recipe()).quantize]
    if not found:
        names = " and ".join(network.name for network in networks)
        raise CalibrationError(
            f"this CLIP has only {names}, which {'stays' if len(networks) == 1 else 'stay'} in 16 bits: connect one "
            "with a large text encoder, such as T5-XXL"
        )
    return found


def encoder_calibration(network: Network, calibration: Calibration | None) -> Calibration | None:
    """What a calibration holds of one encoder, by its tensor keys."""
    return calibration.of_encoder(_prefix(network)) if calibration else None


def check_encoders(jobs: Sequence[NetworkJob], calibration: Calibration | None) -> None:
    """Raises CalibrationError if calibrated rounding would find the inputs of no layer: those of another encoder."""
    jobs = [job for job in jobs if job.quantization.quantized]
    if not jobs or calibration is None or jobs[0].quantization.recipe.rounding != CALIBRATED.name:
        return
    if not any(map(_is_calibrated, jobs)):
        names = " and ".join(job.network.name for job in jobs)
        raise CalibrationError(
            f"the calibration ({calibration.source or 'without a name'}) has no inputs that fit {names}: record this "
            "text encoder with Text Encoder Calibration"
        )


def _is_calibrated(job: NetworkJob) -> bool:
    """Whether any quantized layer's inputs were recorded, with its width."""
    calibration, selection = job.quantization.calibration, job.quantization.selection
    for name in job.quantization.quantized:
        layer = calibration.layers.get(selection.tensor_key(name)) if calibration else None
        if layer and layer.width == job.network.tensors[name].shape[-1]:
            return True
    return False


def _prefix(network: Network) -> str:
    """What the tensor keys of an encoder begin with in a calibration, such as `t5xxl.`."""
    return f"{network.name}."
