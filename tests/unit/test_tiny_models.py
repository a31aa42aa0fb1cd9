"""The tests' own models: the seed and the key decide every weight."""

import pytest
import tiny_models
import torch


@pytest.mark.parametrize("shape", [(8,), (8, 8), (4, 4, 2, 2)])
def test_the_seed_changes_the_weights(shape):
    first, again, other = (tiny_models.weight("blocks.0.weight", shape, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_key_changes_the_weights():
    first, other = (tiny_models.weight(f"blocks.{i}.weight", (8, 8), seed=1) for i in (0, 1))
    assert not torch.equal(first, other)


def test_the_seed_reaches_every_tensor_of_a_model():
    shapes = tiny_models.sd3_shapes(depth=1)
    first, other = (tiny_models.state_dict(shapes, seed=seed) for seed in (0, 1))
    assert [key for key in shapes if torch.equal(first[key], other[key])] == []
