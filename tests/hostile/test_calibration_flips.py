"""Every single flipped bit of a calibration file is refused or harmless.

Harmless: the layers hold the same numbers; or quantizing with them gives, in each layer, the same codes and scale; or
the layer's output error, measured with the undamaged second moment, is at most that of rounding to nearest. Input
scales are the same in every case: nothing measures their error.
"""

import pytest
import torch
from checkpoints import weights
from hostile.amounts import amount
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import StochasticFP8Error, load_calibration, quantize_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder

LAYERS = ("joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.x_block.mlp.fc1.weight")
WIDTH = 16
STEP = amount(37, 1)
"""Every how many bits one is flipped. 37 is prime: all bits of a byte have their turn."""
SHARES = 4
ROUNDING = 1 + 1e-6
"""Errors are compared up to fp64 rounding."""


def output_error(weight, codes, scale, moment):
    """The squared error of a layer's outputs for inputs with this second moment."""
    error = codes.double() * scale.double() - weight.double()
    return torch.einsum("oi,ij,oj->", error, moment.double(), error).item()


class Damaged:
    """A model, its calibration file, and the results that damage is compared with."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.file = folder / "model.safetensors", folder / "calibration.safetensors"
        save_file(weights(*LAYERS, shape=(32, WIDTH)), self.model)
        recorder = ActivationRecorder()
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(WIDTH, WIDTH, generator=generator)
        for layer in LAYERS:  # correlated inputs of unlike sizes, as real layers have them
            recorder.observe(layer, torch.randn(4096, WIDTH, generator=generator) @ mix)
        save_calibration(recorder.result("a model"), self.file)
        self.content = self.file.read_bytes()
        self.numbers = self._numbers()
        self.moments = {layer: self._layer(layer).moment()[0] for layer in LAYERS}
        self.weights = load_file(self.model)
        self.good = self._quantize()
        self.nearest = self._quantize(rounding="nearest")

    def harm(self, bit):
        """What flipping one bit of the file does that it must not, or "". Raises what the library did not catch."""
        content = bytearray(self.content)
        content[bit // 8] ^= 1 << bit % 8
        self.file.write_bytes(content)
        try:
            if self._same_numbers():
                return ""
            result = self._quantize()
        except StochasticFP8Error:
            return ""
        return "; ".join(self._harm(layer, result) for layer in LAYERS if self._harm(layer, result))

    def _harm(self, layer, result):
        codes, scale, input_scale = result[layer]
        good_codes, good_scale, good_input_scale = self.good[layer]
        if not torch.equal(input_scale, good_input_scale):
            return f"{layer} has input scale {input_scale.item()}, not {good_input_scale.item()}"
        if torch.equal(codes, good_codes) and torch.equal(scale, good_scale):
            return ""
        error, most = (
            output_error(self.weights[layer], *found[layer][:2], self.moments[layer])
            for found in (result, self.nearest)
        )
        return "" if error <= most * ROUNDING else f"{layer} has {error / most:.3g} times the squared error of nearest"

    def _layer(self, layer):
        return load_calibration(self.file).layers[layer]

    def _numbers(self):
        """Everything of the calibration that quantizing reads."""
        layers = load_calibration(self.file).layers
        return {key: (layer.width, layer.rows, layer.amax, layer.read_moment()) for key, layer in layers.items()}

    def _same_numbers(self):
        found = self._numbers()
        return found.keys() == self.numbers.keys() and all(
            found[key][:3] == self.numbers[key][:3] and torch.equal(found[key][3], self.numbers[key][3])
            for key in found
        )

    def _quantize(self, rounding="calibrated"):
        """layer -> codes (float8), scale and input scale."""
        target = self.folder / "result.safetensors"
        choices = {"rounding": rounding, "matmul": "fp8", "overwrite": True}
        quantize_file(self.model, target, calibration=self.file, **choices)
        tensors = load_file(target)
        missing = torch.tensor(0.0)
        return {
            layer: (
                tensors[layer],
                tensors[f"{layer}_scale"],
                tensors.get(layer.replace(".weight", ".input_scale"), missing),
            )
            for layer in LAYERS
        }


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return Damaged(tmp_path_factory.mktemp("flips"))


def test_the_undamaged_file_gains(damaged):
    for layer in LAYERS:
        gain = [
            output_error(damaged.weights[layer], *found[layer][:2], damaged.moments[layer])
            for found in (damaged.nearest, damaged.good)
        ]
        assert gain[1] < 0.8 * gain[0]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
def test_every_flipped_bit_is_refused_or_harmless(damaged, share):
    bits = range(share * STEP, 8 * len(damaged.content), SHARES * STEP)
    harm = {}
    for bit in bits:
        try:
            found = damaged.harm(bit)
        except Exception as error:
            found = f"uncaught {type(error).__name__}: {error}"
        if found:
            harm[bit] = found
    print(f"{len(bits):,} of {8 * len(damaged.content):,} bits flipped, {len(harm)} of them with harm")
    assert not harm, f"{len(harm)} of {len(bits)} flips do harm, e.g. " + "; ".join(
        f"bit {bit}: {text}" for bit, text in list(harm.items())[:10]
    )
