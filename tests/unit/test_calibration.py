"""Calibrations as data: recording, adding, saving and loading them, and the errors of invalid ones."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels.calibration import moments
from stochastic_fp8_pack.kernels.calibration.file import METADATA_ENTRY, load_calibration, save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration, LayerCalibration, block_count, moment_size
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.errors import ActivationError, CalibrationError, CheckpointError

KEY = "blocks.0.attn.qkv.weight"


def inputs(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing


def recorded(*calls, key=KEY, **options):
    recorder = ActivationRecorder(**options)
    for x in calls:
        recorder.observe(key, x)
    return recorder.result()


@pytest.mark.parametrize("width", [16, 256, 272, 528])
def test_the_moment_covers_all_rows(width):
    calls = [inputs(50, width), inputs(7, width, seed=1).reshape(1, 7, width), inputs(4, width, 2).reshape(2, 2, width)]
    layer = recorded(*calls).layers[KEY]
    x = np.concatenate([call.reshape(-1, width).double().numpy() for call in calls])
    assert (layer.width, layer.rows) == (width, 61)
    assert layer.amax == pytest.approx(np.abs(x).max(), rel=1e-6)
    expected = x.T @ x / 61
    np.testing.assert_allclose(layer.moment()[0].numpy(), expected, atol=1e-5 * expected.max())


def test_wide_layers_store_blocks_on_the_diagonal(monkeypatch):
    monkeypatch.setattr(moments, "WIDEST_BLOCK", 64)
    moments._band_shapes.cache_clear()
    x = inputs(90, 160)
    moment = recorded(x).layers[KEY].moment()
    moments._band_shapes.cache_clear()
    assert moment.shape == (4, 40, 40)
    for block in range(4):
        columns = x[:, 40 * block : 40 * block + 40].double()
        torch.testing.assert_close(moment[block].double(), columns.T @ columns / 90, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("width", "blocks"), [(16, 1), (3072, 1), (3088, 2), (5120, 2), (12288, 4), (13824, 6), (15360, 5)]
)
def test_blocks_are_equal_and_not_too_wide(width, blocks):
    assert block_count(width) == blocks


def test_only_one_half_is_stored():
    assert moment_size(256) == 256 * 256
    assert moment_size(512) == 512 * 512 - 256 * 256
    assert moment_size(3072) == 3072 * (3072 + 256) // 2


def test_the_calibration_of_a_12_billion_model_stays_below_12_gb():
    """The Linear layers of Flux's blocks: 19 double ones with two streams, 38 single ones."""
    widths = [3072] * (19 * 8 + 38 * 2) + [12288] * 38 + [15360] * 38
    layers = {str(i): LayerCalibration(width, 1, 1.0, torch.Tensor) for i, width in enumerate(widths)}
    assert 11e9 < Calibration(layers).nbytes < 12e9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_of_any_precision(dtype):
    x = torch.tensor([[1.0, -3.0, 0.5, 0.0] * 4], dtype=dtype)
    layer = recorded(x).layers[KEY]
    assert layer.amax == 3.0
    assert layer.moment()[0, 1, :4].tolist() == [-3.0, 9.0, -1.5, 0.0]


def test_many_rows_are_sampled_evenly():
    """Rows 0, 4, 8, … of the first call. The largest value counts even if its row is not recorded."""
    x = torch.zeros(120, 16)
    x[torch.arange(120), torch.arange(120) % 8] = 1
    x[111, 15] = 9
    layer = recorded(x, torch.ones(30, 16), most_rows=30).layers[KEY]
    assert (layer.rows, layer.amax) == (30 + 30, 9)
    taken = 60 * layer.moment()[0].diagonal() - 30
    assert taken.tolist() == pytest.approx([15, 0, 0, 0] * 2 + [0] * 8, abs=1e-4)


@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_sampling_covers_every_column_of_an_image(step):
    """An 8 × 8 image whose columns differ: each gets its share within a few calls."""
    image = torch.eye(8, 16).repeat(8, 1)
    calls = 4 * step
    layer = recorded(*[image] * calls, most_rows=-(-64 // step)).layers[KEY]
    taken = layer.rows * layer.moment()[0].diagonal()[:8]
    assert layer.rows == pytest.approx(64 * calls / step, abs=calls)
    assert taken.tolist() == pytest.approx([layer.rows / 8] * 8, rel=0.5)


def test_empty_calls_are_ignored():
    assert recorded(torch.empty(0, 16)).layers == {}


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "2 NaN and 0 inf"), (float("-inf"), "0 NaN and 2 inf")])
def test_non_finite_inputs_are_an_error_that_names_the_layer(value, text):
    x = torch.zeros(3, 16)
    x[1, 4:6] = value
    with pytest.raises(ActivationError, match=f"'blocks.0.attn.qkv' hold {text}"):
        recorded(x)


def test_calibrations_can_be_added():
    first, second, other = inputs(40, 48), inputs(25, 48, seed=1), inputs(9, 32)
    both = recorded(first, second).layers[KEY]
    merged = recorded(first) + recorded(second) + Calibration(recorded(other, key="head.weight").layers, "heads")
    assert merged.source == "heads"
    assert (Calibration({}, "a") + Calibration({}, "b")).source == "a + b"
    assert set(merged.layers) == {KEY, "head.weight"}
    layer = merged.layers[KEY]
    assert (layer.rows, layer.amax) == (65, both.amax)
    torch.testing.assert_close(layer.moment(), both.moment())


def test_adding_changes_neither():
    first = recorded(inputs(40, 48))
    before = first.layers[KEY].moment().clone()
    first + recorded(inputs(25, 48, seed=1))
    assert torch.equal(first.layers[KEY].moment(), before)
    assert first.layers[KEY].rows == 40


def test_calibrations_of_different_models_cannot_be_added():
    with pytest.raises(CalibrationError, match="'blocks.0.attn.qkv.weight' has 48 inputs in one and 32 in the other"):
        recorded(inputs(9, 48)) + recorded(inputs(9, 32))


def test_a_file_restores_everything(tmp_path):
    made = recorded(inputs(40, 48)) + recorded(inputs(12, 528), key="head.weight")
    made = Calibration(made.layers, "landscapes")
    save_calibration(made, tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert loaded.source == "landscapes"
    assert set(loaded.layers) == {KEY, "head.weight"}
    for key, layer in made.layers.items():
        back = loaded.layers[key]
        assert (back.width, back.rows, back.amax) == (layer.width, layer.rows, layer.amax)
        assert torch.equal(back.moment(), layer.moment())


def test_the_safetensors_library_opens_the_file(tmp_path):
    save_calibration(recorded(inputs(40, 48)), tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert list(file.keys()) == [KEY]
        assert json.loads(file.metadata()[METADATA_ENTRY])["layers"][KEY]["rows"] == 40


def test_a_file_is_not_overwritten_unless_asked(tmp_path):
    path = tmp_path / "c.safetensors"
    save_calibration(recorded(inputs(40, 48)), path)
    with pytest.raises(CheckpointError, match="already exists"):
        save_calibration(recorded(inputs(41, 48)), path)
    save_calibration(recorded(inputs(41, 48)), path, overwrite=True)
    assert load_calibration(path).layers[KEY].rows == 41


GOOD = {"version": 1, "source": "", "layers": {KEY: {"width": 16, "rows": 3, "amax": 1.0}}}


def stated(**changes):
    return GOOD | {"layers": {KEY: GOOD["layers"][KEY] | changes}}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (None, "does not hold an FP8 calibration"),
        ("{", "is a damaged calibration"),
        ("[]", "is a damaged calibration"),
        (GOOD | {"version": 3}, "is a calibration of version 3; known: 1 to 2. Update the pack"),
        (GOOD | {"version": 10**400}, "is a calibration of version 10*[.]{3}0*; known: 1 to 2. Update the pack"),
        (GOOD | {"version": "2"}, "its version is '2'"),
        (GOOD | {"version": 0}, "its version is 0"),
        (GOOD | {"version": True}, "its version is True"),
        (GOOD | {"version": 2}, "it lacks the entry 'digest'"),
        (GOOD | {"version": 2, "digest": "00"}, "its metadata differs from the digest"),
        ({"version": 1, "source": ""}, "it lacks the entry 'layers'"),
        (GOOD | {"layers": [KEY]}, "is a damaged calibration"),
        (GOOD | {"layers": {KEY: []}}, "entry of layer 'blocks.0.attn.qkv.weight' is not an object"),
        (GOOD | {"layers": {KEY: [["width", 16], ["rows", 3], ["amax", 1.0]]}}, "is not an object"),
        (GOOD | {"more": [[]] * 1000}, "its metadata holds more than 16 values per layer"),
        ("[" * 200, "is a damaged calibration"),
        ('{"version": 1, "version": 1}', "'version' occurs twice"),
        (GOOD | {"layers": {}}, "name different layers"),
        (stated(width=32), "of width 32 has float32"),
        (stated(width=10**30), "has width 10{30}"),
        (stated(rows=-1), "rows -1"),
        (stated(rows=True), "rows True"),
        (stated(rows=2**64), "rows 18446744073709551616"),
        (stated(rows=10**399), "rows 10{17}[.]{3}0{19} "),
        (stated(rows=3.0), "rows 3.0"),
        (stated(rows=None), "rows None"),
        (stated(width="16"), "width '16'"),
        (stated(width=[16]), "width .16."),
        (stated(width=0), "width 0"),
        (stated(amax="1"), "amax '1'"),
        (stated(amax=None), "amax None"),
        (stated(amax=float("nan")), "amax nan"),
        (stated(amax=-1.0), "amax -1.0"),
        (stated(amax=1e300), "amax 1e[+]300"),
        (json.dumps(stated(amax=1.5)).replace("1.5", "1e400"), "amax inf"),
    ],
)
def test_a_file_that_is_not_a_calibration_is_refused(tmp_path, entry, text):
    path = tmp_path / "c.safetensors"
    metadata = {} if entry is None else {METADATA_ENTRY: entry if isinstance(entry, str) else json.dumps(entry)}
    save_file({KEY: torch.zeros(256)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"c.safetensors: .*{text}"):
        load_calibration(path)


def write_version_1(path, moment, rows=3, amax=1.0):
    save_file({KEY: moment}, path, {METADATA_ENTRY: json.dumps(stated(rows=rows, amax=amax))})
    return load_calibration(path).layers[KEY]


def test_version_1_is_still_read(tmp_path):
    made = recorded(inputs(40, 16)).layers[KEY]
    layer = write_version_1(tmp_path / "c.safetensors", made.read_moment(), made.rows, made.amax)
    assert torch.equal(layer.moment(), made.moment())


def test_further_entries_of_a_layer_are_kept_and_ignored(tmp_path):
    made = recorded(inputs(40, 16)).layers[KEY]
    further = {"colour": "red", "shares": [0.5, 0.5]}
    layer = LayerCalibration(made.width, made.rows, made.amax, made.read_moment, further)
    for name in ("a.safetensors", "b.safetensors"):
        save_calibration(Calibration({KEY: layer}), tmp_path / name)
        layer = load_calibration(tmp_path / name).layers[KEY]
        assert layer.further == further
        assert torch.equal(layer.moment(), made.moment())
    assert (layer + layer).further == {}


def moment_with(**entries):
    """The identity, with entries such as at_1_2=5.0."""
    moment = torch.eye(16)
    for name, value in entries.items():
        _, row, column = name.split("_")
        moment[int(row), int(column)] = value
    return moment.reshape(-1)


IMPOSSIBLE = {
    "NaN or infinite values": [{"at_4_4": float("nan")}, {"at_0_15": float("inf")}, {"at_2_1": float("-inf")}],
    "a negative sum of squares": [{"at_5_5": -1.0}, {"at_0_0": -1e-30}],
    "a sum of squares that is too large for its amax": [{"at_3_3": 3.1}, {"at_15_15": 1e38}],
    "a sum of products that is too large for its sums of squares": [{"at_0_1": 1.02}, {"at_9_2": -1.02}],
}


@pytest.mark.parametrize(
    ("entries", "text"), [(entries, text) for text, examples in IMPOSSIBLE.items() for entries in examples]
)
def test_an_impossible_moment_is_refused_when_it_is_read(tmp_path, entries, text):
    layer = write_version_1(tmp_path / "c.safetensors", moment_with(**entries))
    with pytest.raises(CheckpointError, match=f"c.safetensors: holds {text} for layer '{KEY}'; calibrate again"):
        layer.moment()


@pytest.mark.parametrize(
    ("entries", "amax"),
    [({}, 1.0), ({"at_0_1": 1.009}, 1.0), ({"at_3_3": 3.02}, 1.0), ({"at_3_3": 3.02, "at_3_4": -1.73}, 1.0)],
)
def test_rounding_errors_of_a_moment_are_allowed(tmp_path, entries, amax):
    write_version_1(tmp_path / "c.safetensors", moment_with(**entries), amax=amax).moment()


@pytest.mark.parametrize("width", [16, 272, 600])
@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-20, 1e-3, 1e10, 1e15])
def test_what_was_recorded_passes_the_check(width, size):
    """Also squares below fp32's range, whose products with larger inputs are not."""
    x = (inputs(20, width) * torch.logspace(0, -25, width)).clamp(-1, 1) * size
    layer = recorded(x, x.flip(0)).layers[KEY]
    moments.check_moment(layer.read_moment(), width, layer.rows, layer.amax)


def test_wide_layers_are_checked_block_by_block(monkeypatch):
    monkeypatch.setattr(moments, "WIDEST_BLOCK", 64)
    moments._band_shapes.cache_clear()
    layer = recorded(inputs(90, 160)).layers[KEY]
    packed = layer.read_moment()
    moments.check_moment(packed, 160, layer.rows, layer.amax)
    for at in (40, 1639, 3240, 4801):
        damaged = packed.clone()
        damaged[at] *= 1e6
        with pytest.raises(ValueError, match="too large"):
            moments.check_moment(damaged, 160, layer.rows, layer.amax)
    moments._band_shapes.cache_clear()


def test_inputs_whose_squares_would_overflow_are_an_error():
    with pytest.raises(ActivationError, match="'blocks.0.attn.qkv' reach 2e[+]15, more than 1e[+]15"):
        recorded(torch.full((3, 16), 2e15))


def test_what_would_be_refused_is_not_saved(tmp_path):
    path = tmp_path / "c.safetensors"
    good = recorded(inputs(40, 16)).layers[KEY]
    for amax, moment, text in (
        (float("nan"), good.read_moment(), "amax nan"),
        (good.amax, -good.read_moment(), "holds a negative sum of squares"),
    ):
        layer = LayerCalibration(good.width, good.rows, amax, lambda moment=moment: moment)
        with pytest.raises(CheckpointError, match=f"c.safetensors: cannot be written: .*layer '{KEY}' .*{text}"):
            save_calibration(Calibration({KEY: layer}), path)
        assert not path.exists()


def two_layers(source=""):
    both = recorded(inputs(40, 16)) + recorded(inputs(30, 16, seed=1), key="head.weight")
    return Calibration(both.layers, source)


def values(calibration):
    layers = {key: (layer.width, layer.rows, layer.amax, layer.further) for key, layer in calibration.layers.items()}
    return calibration.source, layers, {key: layer.read_moment().tolist() for key, layer in calibration.layers.items()}


def test_every_bit_flip_of_a_file_is_refused_or_changes_nothing(tmp_path):
    """The length, the header, the metadata and the moments. A flip of the last digit of an amax may change nothing."""
    path = tmp_path / "c.safetensors"
    save_calibration(two_layers("prompts"), path)
    original, expected = path.read_bytes(), values(load_calibration(path))
    accepted = 0
    with open(path, "r+b", buffering=0) as file:
        for at, byte in enumerate(original):
            for bit in range(8):
                file.seek(at)
                file.write(bytes([byte ^ 1 << bit]))
                try:
                    calibration = load_calibration(path)
                    for layer in calibration.layers.values():
                        layer.read_moment()
                except CheckpointError as error:
                    assert "\n" not in str(error)
                else:
                    accepted += 1
                    assert values(calibration) == expected
            file.seek(at)
            file.write(bytes([byte]))
    assert path.read_bytes() == original
    assert accepted < 5


@pytest.mark.parametrize("change", ["replaced", "rewritten", "touched", "removed", "truncated"])
def test_a_file_that_changes_while_it_is_open_is_an_error(tmp_path, change):
    path, other = tmp_path / "c.safetensors", tmp_path / "other.safetensors"
    save_calibration(two_layers(), path)
    layers = load_calibration(path).layers
    layers[KEY].read_moment()
    before = path.stat()
    text = "was changed or replaced after it was loaded; load it again"
    if change == "replaced":  # by a calibration of the same size and time
        save_calibration(Calibration({key: recorded(inputs(9, 16)).layers[KEY] for key in layers}), other)
        other.replace(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "rewritten":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    elif change == "touched":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    elif change == "removed":
        path.unlink()
        text = "cannot be opened"
    else:
        path.write_bytes(path.read_bytes()[:-4])
        text = "is truncated"
    with pytest.raises(CheckpointError, match=f"c.safetensors: {text}") as caught:
        layers["head.weight"].moment()
    assert "\n" not in str(caught.value)


def test_a_metadata_bomb_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({KEY: torch.zeros(256)}, path, {METADATA_ENTRY: "[" + "[]," * 1_000_000 + "[]]"})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="more than 16 values per layer"):
        load_calibration(path)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
