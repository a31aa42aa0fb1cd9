"""Tensors on their way, as far as a CPU shows it; tests/benchmarks/gpu.py sends them to a GPU and back."""

import pytest
import torch
from stochastic_fp8_pack.kernels import quantize_tensor, transfers
from stochastic_fp8_pack.kernels.transfers import Ahead, begin_transfer, copy, to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Bus:
    """To a GPU that is in truth the CPU: what left for it and what arrived, in order."""

    def __init__(self):
        self.log, self.room = [], True

    def begin(self, x, device):
        if device.type != "cuda":
            return lambda: x
        if not self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.log.append(("left", x.tolist()))

        def arrival():
            self.log.append(("arrived", x.tolist()))
            return x.clone()

        return arrival


@pytest.fixture
def bus(monkeypatch):
    bus = Bus()
    monkeypatch.setattr(transfers, "is_staged", lambda x, device: device.type == "cuda")
    monkeypatch.setattr(transfers, "begin_transfer", bus.begin)
    return bus


def test_a_tensor_that_is_there_already_is_not_copied():
    x = torch.ones(3, 4)
    assert to_device(x, CPU) is x
    assert begin_transfer(x, CPU)() is x


def test_a_copy_lands_in_the_memory_it_is_given():
    target = torch.zeros(3)
    assert copy(torch.arange(3.0), target) is target
    assert target.tolist() == [0, 1, 2]


def test_a_tensor_sent_ahead_is_given_once_and_then_sent_anew(bus):
    x = torch.arange(6.0).reshape(2, 3)
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        assert bus.log == [("left", [[0, 1, 2], [3, 4, 5]])]
        assert ahead(x.reshape(-1), GPU).tolist() == [0, 1, 2, 3, 4, 5]
        assert [what for what, _ in bus.log] == ["left", "arrived"]
        assert ahead(x.reshape(-1), GPU).tolist() == [0, 1, 2, 3, 4, 5]
        assert [what for what, _ in bus.log] == ["left", "arrived", "left", "arrived"]


def test_only_the_very_tensor_that_was_sent_is_given(bus):
    x = torch.arange(6.0)
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        assert ahead(x[:3], GPU).tolist() == [0, 1, 2]
        assert ahead(x.view(torch.int32), GPU).dtype == torch.int32
        assert ahead(x, CPU) is x
        assert bus.log.count(("arrived", x.tolist())) == 0
        assert ahead(x, GPU).tolist() == x.tolist()


def test_a_tensor_that_is_on_its_way_does_not_leave_twice(bus):
    x = torch.ones(2)
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        ahead.begin(x)
    assert bus.log == [("left", [1, 1]), ("arrived", [1, 1])]


def test_leaving_waits_for_what_nobody_asked_for(bus):
    """Or else its memory would be given to others while it is still written to."""
    with pytest.raises(KeyError), Ahead(GPU) as ahead:
        ahead.begin(torch.ones(2))
        raise KeyError("a fault elsewhere")
    assert [what for what, _ in bus.log] == ["left", "arrived"]


def test_without_room_ahead_a_tensor_is_sent_in_its_turn(bus):
    x = torch.arange(3.0)
    bus.room = False
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        bus.room = True
        assert ahead(x, GPU).tolist() == [0, 1, 2]
    assert [what for what, _ in bus.log] == ["left", "arrived"]


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x.T], ids=["strided", "transposed"])
def test_a_tensor_with_holes_is_not_sent_ahead(bus, view):
    x = view(torch.arange(12.0).reshape(3, 4))
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        assert bus.log == []
        assert torch.equal(ahead(x, GPU), x)


def test_what_was_sent_is_what_is_quantized():
    x = torch.randn(64, 64)
    asked = []

    def send(flat, device):
        asked.append((flat.shape, device))
        return -flat

    q = quantize_tensor(x, key="w", seed=1, send=send)
    assert asked == [((4096,), CPU)]
    assert torch.equal(q.codes.view(torch.uint8), quantize_tensor(-x, key="w", seed=1).codes.view(torch.uint8))


def test_without_pinned_memory_ordinary_memory_will_do(monkeypatch):
    empty = torch.empty

    def refuse(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    piece = transfers._pinned(torch.ones(2, 3, dtype=torch.float16))
    assert (piece.shape, piece.dtype) == ((2, 3), torch.float16)
