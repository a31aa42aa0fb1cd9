"""What each ComfyUI version makes of a file, as literal expectations, and the page that shows it."""

import ast
import re

import pytest
import torch
from conftest import PACK_ROOT
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels import plan_file
from stochastic_fp8_pack.kernels.calibration.file import FILE_VERSION, METADATA_ENTRY
from stochastic_fp8_pack.kernels.calibration.moments import TILE, WIDEST_BLOCK
from stochastic_fp8_pack.kernels.files.bounded_json import MAX_VALUES
from stochastic_fp8_pack.kernels.files.header import MAX_ENTRY, MAX_HEADER, MAX_NAME, MAX_TENSORS, TensorInfo
from stochastic_fp8_pack.kernels.selection.components import Components
from stochastic_fp8_pack.kernels.selection.presets import DIFFUSION, NEVER_QUANTIZED, PRESETS, TEXT_ENCODER
from stochastic_fp8_pack.kernels.state_dict import compatibility, findings, layouts
from stochastic_fp8_pack.kernels.state_dict.compatibility import MISTAKEN, NEWER, RENAMED, UNDETECTED, WAYS, verdicts
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
    "TypErr": (
        "fails to load",
        "of language models, only the text encoders of Z-Image and Flux.2 are read in layout native (TypeError)",
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
header               E4M3 limits tell   noise  T5     T5     TypErr  noise  limits noise
header               E5M2 KeyErr KeyErr noise  T5     T5     KeyErr noise  KeyErr noise
header+inline        E4M3 limits tell   noise  T5     T5     TypErr  noise  limits noise
header+inline        E5M2 KeyErr KeyErr noise  T5     T5     KeyErr noise  KeyErr noise
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
        (["header", "inline"], [NEWER], ["not recognised", "exact"]),
        (["legacy"], [NEWER], ["not recognised", "exact"]),
        (["header", "inline"], [MISTAKEN], ["wrong image", "exact"]),
    ],
)
def test_names_that_a_loader_does_not_map(ways, names, outcomes):
    found = verdicts(ways, ["float8_e4m3fn"], "sd3", DIFFUSION, False, names)
    assert [verdict.outcome for verdict in found] == outcomes
    assert all(verdict.usable == (verdict.outcome in ("exact", "degraded")) for verdict in found)


def test_an_undetected_prefix_is_refused_for_a_running_version():
    with pytest.raises(ValueError, match="would not recognise this file: .*Turn on for_another_comfyui"):
        compatibility.check_usable("0.33.0", "native", ["float8_e4m3fn"], sd3("transformer."))


def between(text, begin, end):
    return text.split(begin)[1].split(end)[0].strip("\n")


SHORT_TABLES = ("README.md", "js/docs/StochasticFP8QuantizeFile.md")
"""Pages with a part of the table, in words of their own after the outcome."""
FILES = {
    "diffusion": "diffusion model",
    "all-in-one": "all-in-one checkpoint",
    "T5": "T5-XXL",
    "LLM": "LLM text encoder",
}


def rows_of(page):
    """The cells of each row of the table whose columns are layout, format, file and the ComfyUI versions."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = lines.index(["layout", "format", "file", *compatibility.VERSIONS])
    for cells in lines[start + 2 :]:
        if cells[0] not in ("`native`", "`legacy`"):
            break
        yield cells


@pytest.mark.parametrize("name", SHORT_TABLES)
def test_other_pages_say_what_the_table_says(name):
    """Their first words about a file; what follows explains it."""
    rows = list(rows_of((PACK_ROOT / name).read_text()))
    assert len(rows) >= 6
    for layout, format, file, *cells in rows:
        kinds = FILES if file == "any of them" else [kind for kind, title in FILES.items() if title == file]
        assert kinds, file
        for kind in kinds:
            ways = compatibility.WAYS[layout.strip("`")]
            found = verdicts(ways, [f"float8_{format.lower()}{'fn' * (format == 'E4M3')}"], *NETWORKS[kind])
            said = [re.split("[,:(]", cell)[0].strip() for cell in cells]
            assert said == [verdict.outcome for verdict in found], (layout, format, kind)


def test_the_page_shows_the_table():
    page = PAGE.read_text()
    shown = between(page, "<!-- compatibility table: begin -->", "<!-- compatibility table: end -->")
    assert shown == compatibility.markdown_table()


def test_the_page_lists_every_finding_of_the_verifier():
    """Code, severity and whether repair helps, read off the calls of Finding in state_dict/."""
    severities, repairable = {}, {}
    modules = (PACK_ROOT / "kernels" / "state_dict").glob("*.py")
    for node in [node for module in modules for node in ast.walk(ast.parse(module.read_text()))]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
            code = node.args[1].value
            names = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
            severities.setdefault(code, set()).update(names & {"ERROR", "WARNING", "NOTE"})
            repairable.setdefault(code, set()).add(len(node.args) == 6 and node.args[5].value)
    answers = {(True,): "yes", (False,): "no", (False, True): "if …"}
    found = {
        code: (
            " or ".join(getattr(findings, name) for name in ("ERROR", "WARNING", "NOTE") if name in severities[code]),
            answers[tuple(sorted(repairable[code]))],
        )
        for code in severities
    }
    section = between(PAGE.read_text(), "\n## Verifying", "\n## Repair")
    rows = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    shown = {code.strip("`"): (severity, re.sub("^if .*", "if …", repair)) for code, severity, _, repair in rows}
    assert shown == found
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
    elsewhere = [verdict for verdict in every if compatibility.is_elsewhere(version, str(verdict))]
    assert [verdict.generation == column for verdict in elsewhere] == [False] * (len(every) - 1)
    assert not compatibility.is_elsewhere(version, "'adaLN_modulation' keeps 28.4 % of the parameters")


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


def test_no_format_is_advised_that_changes_nothing():
    """Not one that kept layers do not take, and not the one that is chosen."""
    with pytest.raises(ValueError, match="Choose layout native, or turn on"):
        compatibility.check_usable("0.33.0", "legacy", ["float8_e4m3fn"], sd3(), kept=["float8_e5m2"])
    with pytest.raises(ValueError, match="Choose layout native or float8_e4m3fn, or turn on"):
        compatibility.check_usable("0.33.0", "legacy", ["float8_e5m2"], sd3(), kept=["float8_e4m3fn"])


LOADED_BY_OLD = {
    "anima",
    "auraflow",
    "chroma",
    "cosmos",
    "flux",
    "hidream",
    "hunyuan3d",
    "hunyuan3d_21",
    "hunyuan_dit",
    "hunyuan_video",
    "ltxv",
    "lumina2",
    "mochi",
    "omnigen2",
    "pixart",
    "qwen_image",
    "sd3",
    "sdxl",
    "stable_audio",
    "stable_cascade",
    "ace_step",
    "wan",
}
"""Families with models that ComfyUI 0.3.75 detects (comfy/supported_models.py there), written by hand."""


def test_every_family_is_known_to_be_loaded_by_the_older_version_or_not():
    """A family that is added to the presets alone would be called exact there."""
    families = {family for family, preset in PRESETS.items() if preset.kind == DIFFUSION} - {"unknown"}
    newer = {family for family, models in compatibility.NEWER_MODELS.items() if {} in models}
    assert not newer & LOADED_BY_OLD
    assert families == (newer | LOADED_BY_OLD)


@pytest.mark.parametrize(
    ("sizes", "biases", "outcomes"),
    [
        ({"layers.35.self_attn.q_norm": 128}, False, ["exact", "exact"]),
        ({"layers.35.self_attn.q_norm": 128, "layers.0.self_attn.q_norm": 128}, False, ["exact", "exact"]),
        ({"layers.0.self_attn.q_norm": 128, "width": 4096}, False, ["not recognised", "not recognised"]),
        ({"layers.39.post_attention_layernorm": 5120}, False, ["exact", "exact"]),
        ({"width": 5120}, False, ["exact", "exact"]),
        ({"width": 4096}, False, ["fails to load", "exact"]),
        ({"width": 3584}, True, ["fails to load", "degraded"]),
        ({"width": 3072}, False, ["not recognised", "not recognised"]),
        ({"language_model.layers.0.input_layernorm": 2560}, False, ["not recognised", "not recognised"]),
    ],
)
def test_language_models_in_an_older_version(sizes, biases, outcomes):
    """outcomes: in layout native, in layout legacy."""
    sizes = {"layers.0.post_attention_layernorm": sizes.pop("width", 2560), "layers.0.self_attn.k_proj": 256, **sizes}
    infos = {f"model.{name}.weight": TensorInfo("bfloat16", (size,)) for name, size in sizes.items()}
    if biases:
        infos["model.layers.0.self_attn.k_proj.bias"] = TensorInfo("bfloat16", (256,))
    found = [compatibility.layout_verdicts(layout, ["float8_e4m3fn"], Components(infos))[0] for layout in WAYS]
    assert [verdict.outcome for verdict in found] == outcomes


@pytest.mark.parametrize(
    ("keys", "outcome"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale img_in.weight time_in.in_layer.weight", "exact"),
        ("double_blocks.0.img_attn.norm.key_norm.weight img_in.weight time_in.in_layer.weight", "not recognised"),
        ("head.modulation", "exact"),
        ("head.modulation patch_embedding_pose.weight", "not recognised"),
        ("head.modulation music_projection.weight", "wrong image"),
        ("core.pixel_embedder.proj.weight", "not recognised"),
    ],
)
def test_models_that_an_older_version_does_not_know(keys, outcome):
    components = Components({key: TensorInfo("bfloat16", (64, 64)) for key in keys.split()})
    old, new = compatibility.layout_verdicts("native", ["float8_e4m3fn"], components)
    assert (old.outcome, new.outcome) == (outcome, "exact")


@pytest.mark.parametrize(
    ("layer", "outcome"), [("vision_in.proj.0.weight", "wrong image"), ("vector_in.in_layer.weight", "fails to load")]
)
def test_e5m2_under_names_that_are_replaced(layer, outcome):
    """Tencent's HunyuanVideo 1.5 has no layer whose header entry is read; 1.0 has."""
    start = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
    keys = (start, "double_blocks.0.img_attn_qkv.weight", layer)
    components = Components({key: TensorInfo("bfloat16", (64, 64)) for key in keys})
    old, new = compatibility.layout_verdicts("native", ["float8_e5m2"], components)
    assert (old.outcome, new.outcome) == (outcome, "exact")


@pytest.mark.parametrize("layer", ["img_attn_qkv", "img_attn.qkv"])
def test_the_report_says_that_names_differ_in_the_graph(tmp_path, layer):
    """Only for the names that ComfyUI replaces, those of Tencent."""
    names = ("txt_in.individual_token_refiner.blocks.0.norm1.weight", f"double_blocks.0.{layer}.weight")
    save_file({name: torch.ones(64, 64) for name in names}, tmp_path / "model.safetensors")
    notes = plan_file(tmp_path / "model.safetensors").notes
    assert any(f"e.g. {names[1]}. In the graph they have the new names" in note for note in notes) == ("_qkv" in layer)


def test_a_network_that_computes_in_the_dtype_of_a_weight():
    found = verdicts(["legacy"], ["float8_e4m3fn"], "hunyuan3d_21", DIFFUSION, False)
    assert [verdict.outcome for verdict in found] == ["fails in the sampler", "exact"]


def test_a_loss_is_not_refused():
    assert compatibility.check_usable("0.3.75", "legacy", ["float8_e5m2"], sd3()).outcome == "degraded"
