"""Writes the table of kernels/PRESETS.md from the presets and from the names and shapes of published models.

    cd tests && python -m tools.presets_page

A unit test compares the page with both.
"""

from pathlib import Path

import conftest  # noqa: F401 - loads the pack
import key_lists
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection.presets import DIFFUSION, PRESETS
from stochastic_fp8_pack.kernels.selection.reasons import PRESET_PATTERN, UNUSABLE
from stochastic_fp8_pack.kernels.selection.selection import select_layers

PAGE = Path(__file__).resolve().parents[2] / "kernels" / "PRESETS.md"
START, END = "<!-- table: cd tests && python -m tools.presets_page -->\n", "<!-- end of the table -->\n"

PEERS = {
    "flux": "Flux.2: C the same, S keeps the attention to text as well. Flux.1: nobody keeps the modulation; S 93 %",
    "chroma": "C the same for Chroma, S keeps the attention to text as well. Radiance: C and I 90.5 %, S 92 %",
    "qwen_image": "C 99.5 %, I 99.8 %; S 83 %: keeps the image modulation of every block",
    "wan": "C the same",
    "lumina2": "C the same; S keeps all attention of Z-Image",
    "ltxv": "LTX-2: C 87 %, I 98 %, S 83 %. LTX-Video 13B: S 86 %",
    "sd3": "S 98 %: keeps no modulation",
    "hunyuan_video": "C 100 %: keeps nothing",
    "hidream": "S 99.8 %",
    "anima": "Anima: C 89 %, I 83 %, S 93 %; all three keep the adapter, one because of colour banding",
    "lens": "C 66 %: keeps the modulation",
    "krea2": "C 95 %, S 97 %: quantizes `txtfusion`",
    "ideogram4": "C 97 %: quantizes the modulation; S the same",
    "ernie_image": "I 92 %: keeps the first and the last block; S 99 %",
    "omnigen2": "Boogu: C 99.8 %, S 93 %",
    "minimax_h3": "S 61 %: keeps the modulation",
    "auraflow": "S 99 %",
    "mochi": "S 99 %",
}
"""Family -> the share that other converters quantize, and what differs."""


def table():
    """The rows, one per diffusion model family."""
    shares = _shares()
    lines = ["| family | kept | in FP8 | why | others |", "|---|---|---|---|---|"]
    for family, preset in PRESETS.items():
        if family in shares:
            kept, quantized = (_range(values) for values in zip(*shares[family], strict=True))
            lines.append(
                f"| {preset.title} (`{family}`) | {kept} | {quantized} | {preset.reason} | {PEERS.get(family, '')} |"
            )
    return "\n".join(lines) + "\n"


def _shares():
    """Family -> (Linear layers that are kept, quantized ones) of each of its models, as shares of the parameters."""
    found = {}
    for keys in key_lists.read().values():
        selection = select_layers({name: TensorInfo("bfloat16", shape) for name, shape in keys.shapes.items()})
        assert PRESETS[selection.family].kind == DIFFUSION, f"{keys.name} is not detected"
        kept = [name for name, reason in selection.kept if reason.kind in (PRESET_PATTERN, UNUSABLE)]
        found.setdefault(selection.family, []).append((keys.share(kept), keys.share(selection.quantize)))
    return found


def _range(shares):
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def main():
    before, rest = PAGE.read_text().split(START)
    _, after = rest.split(END)
    PAGE.write_text(before + START + table() + END + after)


if __name__ == "__main__":
    main()
