"""What each ComfyUI version makes of a file, as literal expectations, and the page that shows it."""

import ast
import re

import pytest
from conftest import PACK_ROOT
from stochastic_fp8_pack.kernels.calibration.file import FILE_VERSION, METADATA_ENTRY
from stochastic_fp8_pack.kernels.calibration.moments import TILE, WIDEST_BLOCK
from stochastic_fp8_pack.kernels.files.bounded_json import MAX_VALUES
from stochastic_fp8_pack.kernels.files.header import MAX_ENTRY, MAX_HEADER, MAX_NAME, MAX_TENSORS, TensorInfo
from stochastic_fp8_pack.kernels.selection.presets import DIFFUSION, NEVER_QUANTIZED, TEXT_ENCODER, Components
from stochastic_fp8_pack.kernels.state_dict import compatibility, inspection, layouts
from stochastic_fp8_pack.kernels.state_dict.compatibility import RENAMED, UNDETECTED, verdicts
from stochastic_fp8_pack.kernels.state_dict.markings import MAX_ALL_INLINE, MAX_INLINE

PAGE = PACK_ROOT / "kernels" / "CHECKPOINTS.md"

NETWORKS = {
    "diffusion": ("sd3", DIFFUSION, False),
    "unknown": ("unknown", DIFFUSION, False),
    "all-in-one": ("sd3", DIFFUSION, True),
    "T5": ("t5xxl", TEXT_ENCODER, False),
    "T5 prefixed": ("t5xxl", TEXT_ENCODER, True),
    "LLM": ("llm", TEXT_ENCODER, False),
    "LLM prefixed": ("llm", TEXT_ENCODER, True),
    "CLIP": ("clip", NEVER_QUANTIZED, False),
    "CLIP prefixed": ("clip", NEVER_QUANTIZED, True),
}

VERDICTS = {
    "ok": ("exact", ""),
    "limits": (
        "exact",
        "on an FP8 GPU or with little memory, everything outside Linear layers is cast to FP8 without a scale; "
        "activations stay in 16 bits, whatever matmul is",
    ),
    "algos": ("exact", "if its comfy.quant_ops.QUANT_ALGOS lists float8_e5m2"),
    "cast": ("degraded", "every unquantized Linear weight and every bias is cast to FP8 without a scale"),
    "some": (
        "degraded",
        "text encoders of Flux.2 and Z-Image are read; those of Qwen-Image, Lumina 2, OmniGen2, HunyuanVideo and "
        "HiDream need the legacy layout",
    ),
    "KeyErr": ("fails to load", "float8_e5m2 entries are unknown (KeyError)"),
    "noise": ("wrong image", "all-in-one checkpoints are read in the legacy layout only (noise)"),
    "T5": ("wrong image", "T5 is read in the legacy layout only"),
    "asE4M3": ("wrong image", "legacy E5M2 is read as E4M3, without an error: the image is garbage"),
    "unread": ("wrong image", "inline entries are not read: the codes are used as weights, without their scales"),
    "tell": ("cannot tell", "the pack does not know the model family, nor what ComfyUI makes of its names"),
    "unmark": ("wrong image", "not all layers are marked as scaled: codes are used as weights, without their scales"),
}

EXPECTED = """
ComfyUI 0.3.75        diffusion unknown all-in-one T5     T5_prefixed LLM    LLM_prefixed CLIP   CLIP_prefixed
legacy               E4M3 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy               E5M2 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+header        E4M3 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+header        E5M2 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+inline        E4M3 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+inline        E5M2 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+header+inline E4M3 cast   tell   cast   cast   cast   cast   cast   cast   cast
legacy+header+inline E5M2 cast   tell   cast   cast   cast   cast   cast   cast   cast
header               E4M3 limits tell   noise  T5     T5     some   noise  limits noise
header               E5M2 KeyErr KeyErr KeyErr T5     T5     KeyErr KeyErr KeyErr KeyErr
header+inline        E4M3 limits tell   noise  T5     T5     some   noise  limits noise
header+inline        E5M2 KeyErr KeyErr KeyErr T5     T5     KeyErr KeyErr KeyErr KeyErr
inline               E4M3 unread unread unread unread unread unread unread unread unread
inline               E5M2 unread unread unread unread unread unread unread unread unread
none                 E4M3 unmark unmark unmark unmark unmark unmark unmark unmark unmark
none                 E5M2 unmark unmark unmark unmark unmark unmark unmark unmark unmark
ComfyUI 0.33          diffusion unknown all-in-one T5     T5_prefixed LLM    LLM_prefixed CLIP   CLIP_prefixed
legacy               E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
legacy               E5M2 asE4M3 asE4M3 asE4M3 asE4M3 asE4M3 asE4M3 asE4M3 asE4M3 asE4M3
legacy+header        E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
legacy+header        E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
legacy+inline        E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
legacy+inline        E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
legacy+header+inline E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
legacy+header+inline E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
header               E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
header               E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
header+inline        E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
header+inline        E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
inline               E4M3 ok     tell   ok     ok     ok     ok     ok     ok     ok
inline               E5M2 algos  tell   algos  algos  algos  algos  algos  algos  algos
none                 E4M3 unmark unmark unmark unmark unmark unmark unmark unmark unmark
none                 E5M2 unmark unmark unmark unmark unmark unmark unmark unmark unmark
"""


def expectations():
    """(version, ways, format, network, name of its verdict) of every combination."""
    for line in EXPECTED.strip().splitlines():
        first, second, *cells = line.split()
        if first == "ComfyUI":
            version = f"{first} {second}"
            assert [cell.replace("_", " ") for cell in cells] == list(NETWORKS)
            continue
        for network, cell in zip(NETWORKS, cells, strict=True):
            yield version, first.replace("none", "").split("+"), second, network, cell


def test_every_combination_has_its_verdict():
    checked = set()
    for version, ways, format, network, expected in expectations():
        formats = {"E4M3": [["float8_e4m3fn"]], "E5M2": [["float8_e5m2"], ["float8_e4m3fn", "float8_e5m2"]]}[format]
        for layers in formats:
            verdict = {v.generation: v for v in verdicts(list(filter(None, ways)), layers, *NETWORKS[network])}[version]
            assert (verdict.outcome, verdict.text) == VERDICTS[expected], (version, ways, layers, network)
        checked.add((version, *sorted(ways), format, network))
    assert len(checked) == 2 * 8 * 2 * len(NETWORKS)


@pytest.mark.parametrize(
    ("ways", "names", "outcomes"),
    [
        (["header", "inline"], [RENAMED], ["wrong image", "exact"]),
        (["legacy"], [RENAMED], ["degraded", "exact"]),
        (["header", "inline"], [UNDETECTED], ["not recognised", "not recognised"]),
        ([], [UNDETECTED], ["not recognised", "not recognised"]),
    ],
)
def test_names_that_a_loader_does_not_map(ways, names, outcomes):
    found = verdicts(ways, ["float8_e4m3fn"], "hunyuan_video", DIFFUSION, False, names)
    assert [verdict.outcome for verdict in found] == outcomes
    assert all(verdict.usable == (verdict.outcome in ("exact", "degraded")) for verdict in found)


def test_an_undetected_prefix_is_refused_for_a_running_version():
    with pytest.raises(ValueError, match="would not recognise this file: .*Turn on for_another_comfyui"):
        compatibility.check_usable("0.33.0", "native", ["float8_e4m3fn"], sd3("transformer."))


def between(text, begin, end):
    return text.split(begin)[1].split(end)[0].strip("\n")


def test_the_page_shows_the_table():
    page = PAGE.read_text()
    shown = between(page, "<!-- compatibility table: begin -->", "<!-- compatibility table: end -->")
    assert shown == compatibility.markdown_table()


def test_the_page_lists_every_finding_of_the_verifier():
    """Code, severity and whether repair helps, read off the calls of Finding in inspection.py."""
    severities, repairable = {}, {}
    for node in ast.walk(ast.parse((PACK_ROOT / "kernels" / "state_dict" / "inspection.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
            code = node.args[1].value
            names = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
            severities.setdefault(code, set()).update(names & {"ERROR", "WARNING", "NOTE"})
            repairable.setdefault(code, set()).add(len(node.args) == 6 and node.args[5].value)
    answers = {(True,): "yes", (False,): "no", (False, True): "if it has one element"}
    found = {
        code: (
            " or ".join(getattr(inspection, name) for name in ("ERROR", "WARNING", "NOTE") if name in severities[code]),
            answers[tuple(sorted(repairable[code]))],
        )
        for code in severities
    }
    section = between(PAGE.read_text(), "\n## Verifying", "\n## Repair")
    rows = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert {code.strip("`"): (severity, repair) for code, severity, _, repair in rows} == found
    assert len(rows) == len(found) >= 28


@pytest.mark.parametrize(
    "text",
    [
        f"at most {MAX_HEADER >> 20} MiB, {MAX_TENSORS:,} tensors, {MAX_NAME:,} characters per name and {MAX_ENTRY:,}",
        f"at most {MAX_INLINE >> 10} KiB, all of them together {MAX_ALL_INLINE >> 20} MiB",
        f"JSON has at most {MAX_VALUES:,} values",
        f"bands of {TILE} rows",
        f"more than {WIDEST_BLOCK:,} inputs",
        f'{METADATA_ENTRY}` is JSON:\n\n    {{"version": {FILE_VERSION},',
        f"metadata `{layouts.HEADER_ENTRY}`",
        f"a tensor `<layer>{layouts.INLINE_SUFFIX}`",
        f"one tensor `{layouts.LEGACY_MARKER}`",
        f'"{layouts.FULL_PRECISION}": true',
        *(f"`<layer>{suffix}`" for suffix in (*layouts.WEIGHT_SCALES, *layouts.INPUT_SCALES)),
    ],
)
def test_the_page_names_what_the_code_uses(text):
    assert text in PAGE.read_text()


@pytest.mark.parametrize(
    ("version", "column"),
    [
        ("0.3.9", "ComfyUI 0.3.75"),
        ("0.3.75", "ComfyUI 0.3.75"),
        ("v0.3.76", "ComfyUI 0.3.75"),
        ("0.4.0", "ComfyUI 0.33"),
        ("0.8.0", "ComfyUI 0.33"),
        ("0.33.0", "ComfyUI 0.33"),
        ("1.0", "ComfyUI 0.33"),
    ],
)
def test_the_verdict_of_a_running_version(version, column):
    every = verdicts(["legacy"], ["float8_e4m3fn"], "sd3", DIFFUSION, False)
    assert compatibility.verdict_of(version, every).generation == column


def sd3(prefix=""):
    return Components({f"{prefix}joint_blocks.0.context_block.attn.qkv.weight": TensorInfo("float8_e4m3fn", (192, 64))})


@pytest.mark.parametrize(
    ("version", "layout", "formats", "prefix", "would", "choose"),
    [
        ("0.33.0", "legacy", ["float8_e5m2"], "", "show a wrong image", "layout native or E4M3"),
        (
            "0.33.0",
            "legacy",
            ["float8_e4m3fn", "float8_e5m2"],
            "",
            "show a wrong image",
            "layout native or E4M3",
        ),
        ("0.3.75", "native", ["float8_e5m2"], "", "not load", "layout legacy or E4M3"),
        ("0.3.75", "native", ["float8_e4m3fn"], "model.diffusion_model.", "show a wrong image", "layout legacy"),
    ],
)
def test_what_a_running_version_cannot_use(version, layout, formats, prefix, would, choose):
    choose = choose.replace("E4M3", "float8_e4m3fn")
    with pytest.raises(ValueError, match=f"^ComfyUI {version} would {would}.*: .*Choose {choose}, or turn on") as error:
        compatibility.check_usable(version, layout, formats, sd3(prefix))
    assert "\n" not in str(error.value)
    assert compatibility.check_usable("0.8.0", "native", formats, sd3(prefix)).outcome == "exact"


def test_a_loss_is_not_refused():
    assert compatibility.check_usable("0.3.75", "legacy", ["float8_e5m2"], sd3()).outcome == "degraded"
