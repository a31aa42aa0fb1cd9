"""matplotlib figures of reports, comparisons, inspections and images. The same data gives the same pixels."""

from .activation_probe import activation_probe_figure
from .curve import rounding_curve
from .findings import inspection_sheet
from .histogram import error_histogram
from .image_sheet import image_sheet
from .layer_report import layer_report
from .roundings import check_comparison_size, comparison_figure
from .size_quality import size_quality_figure
from .style import THEMES, drawn_in, save_png, to_image

__all__ = [
    "THEMES",
    "activation_probe_figure",
    "check_comparison_size",
    "comparison_figure",
    "drawn_in",
    "error_histogram",
    "image_sheet",
    "inspection_sheet",
    "layer_report",
    "rounding_curve",
    "save_png",
    "size_quality_figure",
    "to_image",
]
