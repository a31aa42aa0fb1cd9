"""Asynchronous transfers with simulated CUDA streams, on a CPU. tests/benchmarks/gpu.py covers real GPUs."""

from contextlib import contextmanager

import pytest
import torch
from stochastic_fp8_pack.kernels.numerics import transfers
from stochastic_fp8_pack.kernels.numerics.transfers import (
    DeviceToHost,
    HostToDevice,
    Prefetcher,
    begin_transfer,
    copy,
    is_staged,
    to_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Stream:
    """A CUDA stream that runs its work only when someone waits for it, so work that is not waited for is never done."""

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
    """Simulated streams that non-blocking copies are added to. Returns all streams; the first is the current one."""
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
    monkeypatch.setattr(transfers, "PIECES_IN_FLIGHT", 3)
    return streams


SIZES = [1, 3, 4, 5, 12, 13, 40, 41]
"""Elements, in pieces of 4 of which 3 can be in flight: below and at one piece, the limit, many, with a remainder."""


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("strided", [False, True])
def test_host_to_device_arrives_once_the_current_stream_has_waited(cuda, n, strided):
    source = torch.randn(2 * n).half()[::2] if strided else torch.randn(n).half()
    expected, target = source.clone(), torch.zeros(n, dtype=torch.float16)
    transfer = HostToDevice(source, target)
    source.zero_()  # the source may be overwritten now
    assert transfer.result() is target
    cuda[0].synchronize()
    assert torch.equal(target, expected)
    assert cuda[1].most_pending <= 3


def test_a_pinned_source_is_copied_without_staging(cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.delattr(transfers, "_pinned")
    source, target = torch.randn(41), torch.zeros(41)
    HostToDevice(source, target).result()
    cuda[0].synchronize()
    assert torch.equal(target, source)


def test_a_failed_transfer_leaves_nothing_in_flight(cuda, monkeypatch):
    """A later copy would overwrite whoever gets the target's memory next."""
    pinned = transfers._pinned
    left = [pinned, pinned]
    monkeypatch.setattr(transfers, "_pinned", lambda like: left.pop()(like))
    with pytest.raises(IndexError):
        HostToDevice(torch.randn(41), torch.zeros(41))
    assert cuda[1].done == len(cuda[1].queue) > 0


@pytest.mark.parametrize("n", SIZES)
def test_device_to_host_waits_for_the_current_stream(cuda, n):
    source, made = torch.zeros(n, dtype=torch.float16), torch.randn(n).half()
    cuda[0].add(lambda: source.add_(made))
    fetched = DeviceToHost(source).result()
    assert fetched.shape == source.shape and torch.equal(fetched, made)
    assert cuda[1].most_pending <= 3


def test_device_to_host_into_a_target(cuda):
    source, target = torch.randn(3, 13), torch.zeros(39)
    DeviceToHost(source).into(target.view(3, 13))
    assert torch.equal(target.view(3, 13), source)


def test_device_to_host_of_a_transposed_tensor_waits_for_its_contiguous_copy(cuda, monkeypatch):
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
    assert torch.equal(DeviceToHost(source.T).result(), source.T)


def test_a_parameter_is_transferred(cuda):
    source = torch.nn.Parameter(torch.randn(13))
    target = HostToDevice(source, torch.zeros(13)).result()
    cuda[0].synchronize()
    assert torch.equal(DeviceToHost(target).result(), source)


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
def test_only_large_tensors_to_cuda_are_staged(nbytes, device, staged):
    x = torch.empty(nbytes // 2, dtype=torch.float16)
    assert is_staged(x, torch.device(device)) == staged


class Bus:
    """Transfers to a fake GPU (really the CPU), which are in flight until somebody asks for their result."""

    def __init__(self):
        self.started, self.in_flight, self.most_in_flight, self.has_room = 0, 0, 0, True

    def begin(self, x, device):
        if device.type != "cuda":
            return lambda: x
        if not self.has_room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.started += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        source = x.clone()

        def result():
            self.in_flight -= 1
            return source

        return result


@pytest.fixture
def bus(monkeypatch):
    bus = Bus()
    monkeypatch.setattr(transfers, "is_staged", lambda x, device: device.type == "cuda")
    monkeypatch.setattr(transfers, "begin_transfer", bus.begin)
    return bus


def test_a_tensor_that_is_already_there_is_not_copied():
    x = torch.ones(3, 4)
    assert to_device(x, CPU) is x
    assert begin_transfer(x, CPU)() is x


def test_copy_writes_to_its_target():
    target = torch.zeros(3)
    assert copy(torch.arange(3.0), target) is target
    assert target.tolist() == [0, 1, 2]


def test_a_prefetched_tensor_is_handed_out_once(bus):
    x = torch.arange(6.0).reshape(2, 3)
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(x)
        assert prefetcher(x.reshape(-1), GPU).tolist() == [0, 1, 2, 3, 4, 5]
        assert (bus.started, bus.in_flight) == (1, 0)
        x += 1
        assert prefetcher(x.reshape(-1), GPU).tolist() == [1, 2, 3, 4, 5, 6]
        assert (bus.started, bus.in_flight) == (2, 0)


def test_a_prefetched_tensor_is_handed_out_for_no_other(bus):
    x = torch.arange(6.0)
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(x)
        assert prefetcher(x[:3], GPU).tolist() == [0, 1, 2]
        assert prefetcher(x.view(torch.int32), GPU).dtype == torch.int32
        assert prefetcher(x, CPU) is x
        assert bus.in_flight == 1
        assert prefetcher(x, GPU).tolist() == x.tolist()
        assert bus.in_flight == 0


def test_a_tensor_in_flight_is_not_sent_again(bus):
    x = torch.ones(2)
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(x)
        prefetcher.prefetch(x)
    assert bus.started == 1


def test_leaving_waits_for_tensors_in_flight(bus):
    """A copy still in flight would overwrite whoever gets its memory next."""
    with pytest.raises(KeyError), Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(torch.ones(2))
        assert bus.in_flight == 1
        raise KeyError("an error elsewhere")
    assert bus.in_flight == 0


def test_out_of_memory_stops_prefetching(bus):
    x = torch.arange(3.0)
    bus.has_room = False
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(x)
        bus.has_room = True
        prefetcher.prefetch(torch.ones(2))
        assert bus.started == 0
        assert prefetcher(x, GPU).tolist() == [0, 1, 2]


def test_nothing_is_prefetched_without_room(bus):
    with Prefetcher(GPU, has_room=False) as prefetcher:
        prefetcher.prefetch(torch.ones(2))
    assert bus.started == 0


def test_at_most_two_tensors_are_in_flight(bus):
    """Tensors that are never consumed do not fill the GPU."""
    xs = [torch.full((2,), float(i)) for i in range(4)]
    with Prefetcher(GPU) as prefetcher:
        for x in xs:
            prefetcher.prefetch(x)
        assert bus.in_flight == bus.most_in_flight == 2
        for x in xs:
            assert torch.equal(prefetcher(x, GPU), x)
    assert bus.in_flight == 0


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x.T], ids=["strided", "transposed"])
def test_a_tensor_that_is_not_contiguous_is_not_prefetched(bus, view):
    x = view(torch.arange(12.0).reshape(3, 4))
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(x)
        assert bus.started == 0
        assert torch.equal(prefetcher(x, GPU), x)


def test_fallback_to_pageable_memory_with_one_warning(monkeypatch, caplog):
    empty = torch.empty
    transfers._warn_unpinned.cache_clear()

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
