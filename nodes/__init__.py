"""The nodes of the pack. To add one, import its class and append it to NODES."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import routes  # noqa: F401 - registers the routes of the panels
from .activation_probe import StochasticFP8ActivationProbe
from .calibrate_text_encoder import StochasticFP8CalibrateTextEncoder
from .calibration import StochasticFP8Calibrate, StochasticFP8LoadCalibration, StochasticFP8SaveCalibration
from .compare import StochasticFP8Compare, StochasticFP8RoundingCurve
from .demo import StochasticFP8DemoModel
from .image_compare import StochasticFP8ImageCompare
from .inspect import StochasticFP8Inspect
from .preview import StochasticFP8ErrorHistogram, StochasticFP8LayerReport
from .quantize_file import StochasticFP8QuantizeFile
from .quantize_model import StochasticFP8Quantize, StochasticFP8QuantizeTextEncoder
from .save import StochasticFP8Save
from .sensitivity import StochasticFP8Sensitivity
from .size_quality import StochasticFP8SizeQuality

NODES = [
    StochasticFP8Quantize,
    StochasticFP8QuantizeTextEncoder,
    StochasticFP8QuantizeFile,
    StochasticFP8Save,
    StochasticFP8Inspect,
    StochasticFP8DemoModel,
    StochasticFP8ErrorHistogram,
    StochasticFP8LayerReport,
    StochasticFP8Compare,
    StochasticFP8RoundingCurve,
    StochasticFP8ImageCompare,
    StochasticFP8Calibrate,
    StochasticFP8SaveCalibration,
    StochasticFP8LoadCalibration,
    StochasticFP8Sensitivity,
    StochasticFP8CalibrateTextEncoder,
    StochasticFP8SizeQuality,
    StochasticFP8ActivationProbe,
]


class StochasticFP8Extension(ComfyExtension):
    """Lists the nodes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
