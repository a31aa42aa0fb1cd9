"""Makes the small files that the examples *Text encoder* and *Inspect and repair* work on.

    python -m tools.demo_files

writes them to example_workflows/models. Their weights are random.
"""

import tempfile
from pathlib import Path

import conftest  # noqa: F401 - loads the pack
import tiny_models
import torch
from safetensors.torch import load_file

FOLDER = tiny_models.SHIPPED_MODELS
T5_BLOCKS, T5_SIZE, T5_WORDS = 24, 32, 256


def write_t5(path):
    """A text encoder with the layers of T5-XXL, but 32 wide. No loader accepts it."""
    shapes = {"shared.weight": (T5_WORDS, T5_SIZE), "encoder.final_layer_norm.weight": (T5_SIZE,)}
    for block in range(T5_BLOCKS):
        attention, feed_forward = (f"encoder.block.{block}.layer.{layer}" for layer in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (T5_SIZE, T5_SIZE) for part in "qkvo"}
        shapes[f"{feed_forward}.DenseReluDense.wi.weight"] = (4 * T5_SIZE, T5_SIZE)
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (T5_SIZE, 4 * T5_SIZE)
        shapes |= {f"{layer}.layer_norm.weight": (T5_SIZE,) for layer in (attention, feed_forward)}
    return tiny_models.save(tiny_models.state_dict(shapes), path)


def write_damaged(path):
    """A scaled FP8 diffusion model with faults that converters leave, all of which can be repaired."""
    from stochastic_fp8_pack.kernels import quantize_file

    with tempfile.TemporaryDirectory() as folder:
        source = tiny_models.write_sd3(Path(folder) / "tiny_sd3.safetensors")
        quantize_file(source, path, overwrite=True)
    tensors = load_file(path)
    in_16_bits, of_two_dimensions = sorted(name for name in tensors if name.endswith("x_block.mlp.fc1.weight_scale"))
    tensors[in_16_bits] = tensors[in_16_bits].to(torch.bfloat16)
    tensors[of_two_dimensions] = tensors[of_two_dimensions].reshape(1, 1)
    return tiny_models.save(tensors, path)  # without the metadata, which marks the layers


FILES = {"tiny_t5.safetensors": write_t5, "damaged_fp8.safetensors": write_damaged}


if __name__ == "__main__":
    for name, write in FILES.items():
        write(FOLDER / name)
