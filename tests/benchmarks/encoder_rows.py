"""Calibrated rounding of a text encoder, through the code of the pack's nodes, with padded positions and without."""

from comfyui.server import comfyui_dir
from measure import Absent, Row, in_child

BAR = 0.8
WAYS = {"counted": "padded positions counted", "left out": "padded positions left out"}
"""How Text Encoder Calibration could record; it counts padded positions."""
QUANTITIES = {
    "masked": {0: "cosine distance of the sentences"},
    "used": {2: "squared error of all positions", 1: "squared error of the words alone"},
}
"""Which of the numbers of text_encoder.measure are shown, where padding is hidden by a mask, or used by the model."""
TITLES = {"masked": "padding masked", "used": "padding used by the model"}


def rows(rounds):
    """`rounds` is not used: these rows are qualities."""
    try:
        results = in_child("text_encoder", comfyui_dir())
    except Absent as reason:
        yield Row("sentences", "absent", str(reason))
        return
    for padding, quantities in QUANTITIES.items():
        for index, what in quantities.items():
            nearest = results[padding]["nearest"][index]
            for way, title in WAYS.items():
                ours = results[padding][way][index]
                kept = way == "counted"
                verdict = (f"<= {BAR} x", ours / nearest <= BAR) if kept else ("", None)
                name = f"{TITLES[padding]}, {title}: {what}"
                yield Row(name, f"{ours:.3g}", f"nearest {nearest:.3g}", f"{ours / nearest:.3f} x", *verdict)
