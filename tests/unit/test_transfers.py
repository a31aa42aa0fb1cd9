"""Tensors on their way, as far as a CPU shows it; tests/benchmarks/gpu.py sends them to a GPU and back."""

from contextlib import contextmanager

import pytest
import torch
from stochastic_fp8_pack.kernels import quantize_tensor
from stochastic_fp8_pack.kernels.numerics import transfers
from stochastic_fp8_pack.kernels.numerics.transfers import (
    Ahead,
    Fetching,
    Sending,
    begin_transfer,
    copy,
    is_staged,
    to_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Stream:
    """A CUDA stream that does nothing until someone waits for it, so that what nobody waits for is never done."""

    def __init__(self):
        self.queue, self.done = [], 0
        self.pending, self.most_pending = 0, 0

    def add(self, work):
        def do():
            work()
            self.pending -= 1

        self.queue.append(do)
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)

    def run(self, until=None):
        while self.done < (len(self.queue) if until is None else until):
            self.done += 1
            self.queue[self.done - 1]()

    synchronize = run

    def wait_stream(self, other):
        until = len(other.queue)
        self.queue.append(lambda: other.run(until))

    def wait_event(self, event):
        self.queue.append(event.synchronize)

    def record_event(self):
        return Event(self, len(self.queue))


class Event:
    def __init__(self, stream, position):
        self.stream, self.position = stream, position

    def synchronize(self):
        self.stream.run(self.position)


@pytest.fixture
def cuda(monkeypatch):
    """Streams as a GPU has them, to which copies that do not block are added. Gives the current one and all others."""
    streams = [Stream()]
    now = [streams[0]]

    def new(device=None):
        streams.append(Stream())
        return streams[-1]

    @contextmanager
    def enter(stream):
        now.append(stream)
        try:
            yield
        finally:
            now.pop()

    copy_at_once = torch.Tensor.copy_

    def copy_(self, source, non_blocking=False):
        if non_blocking:
            now[-1].add(lambda: copy_at_once(self, source))
            return self
        return copy_at_once(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[0])
    monkeypatch.setattr(transfers, "_pinned", lambda like: torch.zeros(like.shape, dtype=like.dtype))
    monkeypatch.setattr(transfers, "PIECE_BYTES", 8)
    monkeypatch.setattr(transfers, "PIECES", 3)
    return streams


SIZES = [1, 3, 4, 5, 12, 13, 40, 41]
"""In pieces of 4, of which 3 can be on their way: less than one, one, all, many, with and without a rest."""


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("strided", [False, True])
def test_what_is_sent_arrives_when_the_current_stream_has_waited(cuda, n, strided):
    source = torch.randn(2 * n).half()[::2] if strided else torch.randn(n).half()
    expected, target = source.clone(), torch.zeros(n, dtype=torch.float16)
    sending = Sending(source, target)
    source.zero_()  # it has left its place
    assert sending.result() is target
    cuda[0].synchronize()
    assert torch.equal(target, expected)
    assert cuda[1].most_pending <= 3


def test_what_is_pinned_is_sent_from_where_it_lies(cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    source, target = torch.randn(41), torch.zeros(41)
    sending = Sending(source, target)
    assert cuda[1].most_pending == 1
    sending.result()
    cuda[0].synchronize()
    assert torch.equal(target, source)


def test_a_transfer_that_fails_leaves_nothing_on_its_way(cuda, monkeypatch):
    """Or else others that get the target's memory would be written to."""
    pinned = transfers._pinned
    left = [pinned, pinned]
    monkeypatch.setattr(transfers, "_pinned", lambda like: left.pop()(like))
    with pytest.raises(IndexError):
        Sending(torch.randn(41), torch.zeros(41))
    assert cuda[1].done == len(cuda[1].queue) > 0


@pytest.mark.parametrize("n", SIZES)
def test_what_is_fetched_is_what_the_current_stream_makes_of_it(cuda, n):
    source, made = torch.zeros(n, dtype=torch.float16), torch.randn(n).half()
    cuda[0].add(lambda: source.add_(made))
    fetched = Fetching(source).result()
    assert fetched.shape == source.shape and torch.equal(fetched, made)
    assert cuda[1].most_pending <= 3


def test_what_is_fetched_lands_in_the_memory_it_is_given(cuda):
    source, target = torch.randn(3, 13), torch.zeros(39)
    Fetching(source).into(target.view(3, 13))
    assert torch.equal(target.view(3, 13), source)


def test_a_transposed_tensor_is_fetched_once_the_gpu_has_put_it_in_order(cuda, monkeypatch):
    reshape_at_once = torch.Tensor.reshape

    def reshape(self, *shape):
        made = reshape_at_once(self, *shape)
        if made.data_ptr() == self.data_ptr():
            return made
        later = torch.zeros_like(made)
        cuda[0].add(lambda: torch.add(reshape_at_once(self, *shape), 0, out=later))
        return later

    monkeypatch.setattr(torch.Tensor, "reshape", reshape)
    source = torch.randn(3, 13)
    assert torch.equal(Fetching(source.T).result(), source.T)


def test_a_parameter_travels(cuda):
    source = torch.nn.Parameter(torch.randn(13))
    target = Sending(source, torch.zeros(13)).result()
    cuda[0].synchronize()
    assert torch.equal(Fetching(target).result(), source)


@pytest.mark.parametrize(
    ("nbytes", "device", "staged"),
    [
        (transfers.STAGED_BYTES + 2, "cuda", True),
        (transfers.STAGED_BYTES + 2, "cuda:1", True),
        (transfers.STAGED_BYTES, "cuda", False),
        (transfers.STAGED_BYTES + 2, "mps", False),
        (transfers.STAGED_BYTES + 2, "cpu", False),
    ],
)
def test_large_tensors_are_staged_on_their_way_to_cuda(nbytes, device, staged):
    x = torch.empty(nbytes // 2, dtype=torch.float16)
    assert is_staged(x, torch.device(device)) == staged


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


def test_without_room_ahead_tensors_are_sent_in_their_turn(bus):
    x = torch.arange(3.0)
    bus.room = False
    with Ahead(GPU) as ahead:
        ahead.begin(x)
        bus.room = True
        ahead.begin(torch.ones(2))
        assert bus.log == []
        assert ahead(x, GPU).tolist() == [0, 1, 2]
    assert [what for what, _ in bus.log] == ["left", "arrived"]


def test_where_there_is_no_room_nothing_is_sent_ahead(bus):
    with Ahead(GPU, has_room=False) as ahead:
        ahead.begin(torch.ones(2))
    assert bus.log == []


def test_no_more_than_two_are_ahead(bus):
    """What nobody asks for does not fill the GPU."""
    xs = [torch.full((2,), float(i)) for i in range(3)]
    with Ahead(GPU) as ahead:
        for x in xs:
            ahead.begin(x)
        assert [what for what, _ in bus.log] == ["left", "left", "arrived", "left"]
        for x in xs:
            assert torch.equal(ahead(x, GPU), x)
    assert [values[0] for what, values in bus.log if what == "left"] == [0, 1, 2, 0]


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


def test_without_pinned_memory_ordinary_memory_will_do(monkeypatch, caplog):
    empty = torch.empty
    transfers._log_refusal.cache_clear()

    def refuse(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    for _ in range(2):
        piece = transfers._pinned(torch.ones(2, 3, dtype=torch.float16))
        assert (piece.shape, piece.dtype) == ((2, 3), torch.float16)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CUDA error: out of memory" in caplog.text
