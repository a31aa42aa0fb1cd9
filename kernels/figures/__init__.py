"""Reports as pictures: matplotlib Figures on the Agg canvas, the same pixels for the same report."""

from .histogram import error_histogram
from .style import save_png, to_image

__all__ = ["error_histogram", "save_png", "to_image"]
