"""Reports as pictures: matplotlib Figures on the Agg canvas, the same pixels for the same report."""

from .curve import rounding_curve
from .histogram import error_histogram
from .image_sheet import image_sheet
from .layer_report import layer_report
from .roundings import check_comparison_size, comparison_figure
from .style import save_png, to_image

__all__ = [
    "check_comparison_size",
    "comparison_figure",
    "error_histogram",
    "image_sheet",
    "layer_report",
    "rounding_curve",
    "save_png",
    "to_image",
]
