"""Calibrations as data: recording, adding, saving and loading them, and the errors of invalid ones."""

import json

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
        (GOOD | {"version": 2}, "is a calibration of version 2; known: 1. Update the pack"),
        (GOOD | {"layers": {}}, "name different layers"),
        (stated(width=32), "of width 32 has float32"),
        (stated(width=10**30), "has width 10{30}"),
        (stated(rows=-1), "rows -1"),
        (stated(rows=True), "rows True"),
        (stated(amax="1"), "amax '1'"),
        (stated(colour="red"), "unexpected keyword argument"),
    ],
)
def test_a_file_that_is_not_a_calibration_is_refused(tmp_path, entry, text):
    path = tmp_path / "c.safetensors"
    metadata = {} if entry is None else {METADATA_ENTRY: entry if isinstance(entry, str) else json.dumps(entry)}
    save_file({KEY: torch.zeros(256)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"c.safetensors: .*{text}"):
        load_calibration(path)


def test_a_damaged_moment_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({KEY: torch.full((256,), float("nan"))}, path, {METADATA_ENTRY: json.dumps(GOOD)})
    layer = load_calibration(path).layers[KEY]
    with pytest.raises(CheckpointError, match="NaN or infinite values for layer 'blocks.0.attn.qkv.weight'"):
        layer.moment()
