"""The exceptions: their names as users see them, and pickling, which carries them between processes."""

import pickle

import pytest
from stochastic_fp8_pack.kernels import errors
from stochastic_fp8_pack.kernels.errors import CheckpointError, NonFiniteError, StochasticFP8Error, file_error

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StochasticFP8Error)]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_names_are_short(kind):
    assert f"{kind.__module__}.{kind.__qualname__}" == f"stochastic_fp8.{kind.__name__}"


@pytest.mark.parametrize(
    "error",
    [StochasticFP8Error("no"), NonFiniteError("blocks.0.weight", 2, 1), file_error("a/b.safetensors", "is empty")],
    ids=lambda error: type(error).__name__,
)
def test_pickled(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_caught_by_class():
    with pytest.raises(CheckpointError, match=r"^b.safetensors: is empty$"):
        raise pickle.loads(pickle.dumps(file_error("a/b.safetensors", "is empty")))
