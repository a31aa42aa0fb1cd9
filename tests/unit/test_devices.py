"""Making do with less memory, as far as a CPU shows it; tests/benchmarks/gpu.py does the rest."""

import logging
import threading

import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import NonFiniteError, quantize_tensor
from stochastic_fp8_pack.kernels.files.background import Background
from stochastic_fp8_pack.kernels.numerics import memory as devices
from stochastic_fp8_pack.kernels.numerics import quantized_tensor as quantize
from stochastic_fp8_pack.kernels.numerics.memory import SMALLEST_SLICE, slices, with_enough_memory
from stochastic_fp8_pack.kernels.numerics.random_bits import BLOCK, random_words, stream_from

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(devices, "_refusals", set())


class Memory:
    """Computes on a device that has room for a slice of so many elements, and remembers what it was asked."""

    def __init__(self, room):
        self.room, self.asked = room, []

    def compute(self, device, size):
        self.asked.append((device.type, size))
        if device.type == "cuda" and size > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return device.type, size


def test_a_device_with_the_memory_gets_it_all_at_once():
    memory = Memory(10**9)
    assert with_enough_memory(memory.compute, CUDA, 10**9, "w") == ("cuda", 10**9)


def test_with_less_memory_slices_get_smaller(caplog):
    memory = Memory(10**8)
    count = 10**9
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(memory.compute, CUDA, count, "blocks.0.weight")[0] == "cuda"
    sizes = [size for _, size in memory.asked]
    assert sizes == [10**9, 249954304, 62390272]
    assert all(size % BLOCK == 0 for size in sizes[1:])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "blocks.0.weight" in caplog.text and "out of memory" in caplog.text


def test_without_memory_the_cpu_computes(caplog):
    memory = Memory(0)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(memory.compute, CUDA, 10**9, "w") == ("cpu", 10**9)
    assert memory.asked[-2] == ("cuda", SMALLEST_SLICE)
    assert "computing on the CPU" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("error", [NotImplementedError("no such operator"), TypeError("no float64 on MPS")])
def test_what_a_device_refuses_the_cpu_computes(caplog, error):
    def compute(device, size):
        if device.type == "mps":
            raise error
        return device.type

    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(compute, MPS, 5, "w") == "cpu"
    assert str(error) in caplog.text


def test_what_a_device_refuses_is_said_once(caplog):
    def compute(device, size):
        if device.type == "mps":
            raise RuntimeError("refused for every layer")
        return device.type

    with caplog.at_level(logging.DEBUG, "stochastic_fp8"):
        assert [with_enough_memory(compute, MPS, 5, name) for name in ("a", "b")] == ["cpu", "cpu"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
    assert "tensor 'a'" in caplog.text and "tensor 'b'" in caplog.text


@pytest.mark.parametrize(
    ("device", "error"), [(CUDA, RuntimeError("launch failed")), (CUDA, NonFiniteError("w", 1, 0))]
)
def test_other_errors_pass(device, error):
    def compute(device, size):
        raise error

    with pytest.raises(type(error)):
        with_enough_memory(compute, device, 5, "w")


def test_what_a_device_refuses_has_the_same_bytes(caplog, monkeypatch):
    def refuse(flat, device, *rest):
        if device.type == "mps":
            raise RuntimeError("no such operator")
        return slices(flat, device, *rest)

    x = torch.randn(1000)
    expected = quantize_tensor(x, key="w").codes
    monkeypatch.setattr(quantize, "slices", refuse)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        q = quantize_tensor(x, key="w", device="mps")
    assert torch.equal(q.codes.view(torch.uint8), expected.view(torch.uint8))
    assert "tensor 'w': mps refuses (no such operator)" in caplog.text


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_slices_give_the_bytes_and_statistics_of_the_whole(monkeypatch, rounding):
    x = torch.randn(5 * BLOCK + 77, generator=torch.Generator().manual_seed(0))
    whole = quantize_tensor(x, key="w", rounding=rounding, statistics=True)
    monkeypatch.setattr(quantize, "with_enough_memory", lambda compute, device, count, name: compute(device, 2 * BLOCK))
    sliced = quantize_tensor(x, key="w", rounding=rounding, statistics=True)
    assert torch.equal(sliced.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert (sliced.scale, sliced.amax) == (whole.scale, whole.amax)
    assert sliced.error.step_histogram == whole.error.step_histogram
    assert sliced.error.samples == whole.error.samples
    assert sliced.error.sum_squared_error == pytest.approx(whole.error.sum_squared_error, rel=1e-6)


def test_nan_in_any_slice_is_found(monkeypatch):
    x = torch.ones(3 * BLOCK)
    x[2 * BLOCK + 1] = float("nan")
    monkeypatch.setattr(quantize, "with_enough_memory", lambda compute, device, count, name: compute(device, BLOCK))
    with pytest.raises(NonFiniteError, match="1 NaN and 0 infinite"):
        quantize_tensor(x)


def test_slices_cover_a_tensor_in_order():
    x = torch.arange(10)
    assert [(start, part.tolist()) for start, part in slices(x, CPU, 4)] == [
        (0, [0, 1, 2, 3]),
        (4, [4, 5, 6, 7]),
        (8, [8, 9]),
    ]
    assert [start for start, _ in slices(torch.empty(0), CPU, 4)] == [0]


def test_a_stream_can_be_entered_at_any_block():
    later = random_words(stream_from(12345, 3), 0, 1000)
    np.testing.assert_array_equal(later, random_words(12345, 3 * BLOCK, 1000))
    assert 0 <= stream_from(2**64 - 1, 10**6) < 2**64


def test_codes_go_to_the_memory_that_is_offered():
    x = torch.randn(30, 10)
    memory = torch.full((301,), 0xFF, dtype=torch.uint8)
    q = quantize_tensor(x, key="w", out=memory)
    assert q.codes.data_ptr() == memory.data_ptr()
    assert torch.equal(memory[:300], quantize_tensor(x, key="w").codes.view(torch.uint8).reshape(-1))
    assert memory[300] == 0xFF


@pytest.mark.parametrize(
    "memory",
    [
        torch.empty(299, dtype=torch.uint8),
        torch.empty(300, dtype=torch.int8),
        torch.empty((30, 10), dtype=torch.uint8),
        torch.empty(600, dtype=torch.uint8)[::2],
        torch.empty(300, dtype=torch.uint8, device="meta"),
    ],
    ids=["too small", "of another dtype", "of another shape", "strided", "elsewhere"],
)
def test_memory_that_does_not_do_is_an_error_that_names_the_tensor(memory):
    with pytest.raises(ValueError, match=r"codes of tensor 'w' is .*give contiguous torch.uint8 \(300 or more,\)"):
        quantize_tensor(torch.randn(30, 10), key="w", out=memory)


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:1].expand(50), lambda x: x.reshape(1, -1)[:, ::4]])
def test_backends_get_contiguous_memory(monkeypatch, view):
    """The GPU's kernels go by the address alone."""
    seen = []
    monkeypatch.setattr(quantize, "slices", lambda flat, *rest: seen.append(flat) or slices(flat, *rest))
    quantize_tensor(view(torch.randn(200)), key="w")
    assert [flat.is_contiguous() for flat in seen] == [True]


def test_background_work_is_done_one_by_one_and_in_order():
    done, first_may_end = [], threading.Event()

    def first():
        first_may_end.wait(10)
        done.append(1)

    with Background("test") as background:
        background.run(first)
        assert done == []
        first_may_end.set()
        background.run(done.append, 2)
        background.wait()
        assert done == [1, 2]


def test_an_error_in_the_background_comes_out():
    with Background("test") as background:
        background.run(int, "x")
        with pytest.raises(ValueError, match="invalid literal"):
            background.run(print)
        background.wait()


def test_leaving_waits_for_the_last_task_and_says_what_it_raised():
    done = []
    with Background("test") as background:
        background.run(done.append, 1)
    assert done == [1]
    with pytest.raises(ValueError, match="invalid literal"), Background("test") as background:
        background.run(int, "x")
    with pytest.raises(KeyError), Background("test") as background:
        background.run(int, "x")
        raise KeyError("the first fault counts")
