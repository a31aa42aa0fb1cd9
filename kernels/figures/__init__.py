"""Reports as pictures: matplotlib Figures on the Agg canvas, the same pixels for the same report."""

from .histogram import error_histogram
from .layer_report import layer_report
from .style import save_png, to_image

__all__ = ["error_histogram", "layer_report", "save_png", "to_image"]
