"""Placement, slices and the fallbacks when memory is short, on a CPU. tests/benchmarks/gpu.py covers real GPUs."""

import logging

import pytest
import torch
from stochastic_fp8_pack.kernels import NonFiniteError, quantize_tensor
from stochastic_fp8_pack.kernels.numerics import memory, placement
from stochastic_fp8_pack.kernels.numerics.memory import SMALLEST_SLICE, with_enough_memory
from stochastic_fp8_pack.kernels.numerics.placement import Placement, Slices
from stochastic_fp8_pack.kernels.numerics.random_bits import BLOCK

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def forget_warnings():
    memory._warn_unsupported.cache_clear()


class FakeDevice:
    """Computes slices of up to `room` elements on a CUDA device, and records every attempt."""

    def __init__(self, room):
        self.room, self.attempts = room, []

    def compute(self, device, size):
        self.attempts.append((device.type, size))
        if device.type == "cuda" and size > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return device.type, size


def raises_on_mps(error):
    def compute(device, size):
        if device.type == "mps":
            raise error
        return device.type

    return compute


def use_slices_of(size, monkeypatch):
    monkeypatch.setattr(placement, "with_enough_memory", lambda compute, device, count, key: compute(device, size))


def test_enough_memory_gives_one_slice():
    assert with_enough_memory(FakeDevice(10**9).compute, CUDA, 10**9, "w") == ("cuda", 10**9)


def test_slices_shrink_until_they_fit(caplog):
    fake = FakeDevice(room=10**8)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(fake.compute, CUDA, 10**9, "blocks.0.weight")[0] == "cuda"
    sizes = [size for _, size in fake.attempts]
    assert sizes == [10**9, 249954304, 62390272]
    assert all(size % BLOCK == 0 for size in sizes[1:])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "tensor 'blocks.0.weight': cuda is out of memory; falling back to slices of 62390272 elements" in caplog.text


def test_fallback_to_the_cpu_below_the_smallest_slice(caplog):
    fake = FakeDevice(room=0)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(fake.compute, CUDA, 10**9, "w") == ("cpu", 10**9)
    assert fake.attempts[-2] == ("cuda", SMALLEST_SLICE)
    assert caplog.records[-1].getMessage() == "tensor 'w': cuda is out of memory; falling back to the CPU"


@pytest.mark.parametrize("error", [NotImplementedError("no such operator"), TypeError("no float64 on MPS")])
def test_fallback_to_the_cpu_for_an_unsupported_operation(caplog, error):
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert with_enough_memory(raises_on_mps(error), MPS, 5, "w") == "cpu"
    assert str(error) in caplog.text


def test_an_unsupported_operation_is_one_warning_for_all_tensors(caplog):
    compute = raises_on_mps(RuntimeError("no such operator"))
    with caplog.at_level(logging.DEBUG, "stochastic_fp8"):
        assert [with_enough_memory(compute, MPS, 5, key) for key in ("a", "b")] == ["cpu", "cpu"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]
    assert "tensor 'a'" in caplog.text and "tensor 'b'" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("launch failed"), NonFiniteError("w", 1, 0)])
def test_other_errors_on_cuda_are_raised(error):
    def compute(device, size):
        raise error

    with pytest.raises(type(error)):
        with_enough_memory(compute, CUDA, 5, "w")


def test_a_fallback_to_the_cpu_does_not_change_the_bytes(caplog):
    def send(flat, device):
        if device.type == "mps":
            raise RuntimeError("no such operator")
        return flat

    x = torch.randn(1000)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        q = quantize_tensor(x, key="w", placement=Placement("mps", send=send))
    assert torch.equal(q.codes.view(torch.uint8), quantize_tensor(x, key="w").codes.view(torch.uint8))
    assert "mps cannot quantize some tensors (no such operator)" in caplog.text


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_slices_do_not_change_bytes_and_statistics(monkeypatch, rounding):
    x = torch.randn(5 * BLOCK + 77, generator=torch.Generator().manual_seed(0))
    whole = quantize_tensor(x, key="w", rounding=rounding, statistics=True)
    use_slices_of(2 * BLOCK, monkeypatch)
    sliced = quantize_tensor(x, key="w", rounding=rounding, statistics=True)
    assert torch.equal(sliced.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert (sliced.scale, sliced.amax) == (whole.scale, whole.amax)
    assert sliced.error.step_histogram == whole.error.step_histogram
    assert sliced.error.samples == whole.error.samples
    assert sliced.error.sum_squared_error == pytest.approx(whole.error.sum_squared_error, rel=1e-6)


def test_non_finite_values_are_counted_over_all_slices(monkeypatch):
    x = torch.ones(3 * BLOCK)
    x[1], x[2 * BLOCK + 1], x[-1] = float("nan"), float("nan"), float("inf")
    use_slices_of(BLOCK, monkeypatch)
    with pytest.raises(NonFiniteError, match="2 NaN and 1 infinite"):
        quantize_tensor(x)


def test_slices_cover_a_tensor_in_order():
    x = torch.arange(10)
    slices = Slices(x, Placement(), CPU, 4)
    parts = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [part.tolist() for part in slices] == parts
    assert [part.tolist() for part in slices] == parts
    for start, part, codes in slices.with_codes():
        codes.copy_(part + start)
    assert slices.codes.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17]


def test_an_empty_tensor_is_one_empty_slice():
    slices = Slices(torch.empty(0), Placement(), CPU, 4)
    assert [len(part) for part in slices] == [0]
    assert [(start, len(codes)) for start, _, codes in slices.with_codes()] == [(0, 0)]


def test_the_staging_buffer_receives_the_codes():
    x = torch.randn(30, 10)
    buffer = torch.full((301,), 0xFF, dtype=torch.uint8)
    q = quantize_tensor(x, key="w", placement=Placement(codes=buffer))
    assert q.codes.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:300], quantize_tensor(x, key="w").codes.view(torch.uint8).reshape(-1))
    assert buffer[300] == 0xFF


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(299, dtype=torch.uint8),
        torch.empty(300, dtype=torch.int8),
        torch.empty((30, 10), dtype=torch.uint8),
        torch.empty(600, dtype=torch.uint8)[::2],
        torch.empty(300, dtype=torch.uint8, device="meta"),
    ],
    ids=["too small", "other dtype", "other shape", "strided", "other device"],
)
def test_an_unsuitable_staging_buffer_is_an_error_that_names_the_tensor(buffer):
    text = r"staging buffer for the codes of tensor 'w' is .*expected contiguous torch.uint8 \(300 or more,\) on cpu"
    with pytest.raises(ValueError, match=text):
        quantize_tensor(torch.randn(30, 10), key="w", placement=Placement(codes=buffer))


def test_device_and_placement_together_are_a_type_error():
    with pytest.raises(TypeError, match="either `device` or `placement`"):
        quantize_tensor(torch.ones(1), device="cpu", placement=Placement())


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:1].expand(50), lambda x: x.reshape(1, -1)[:, ::4]])
def test_the_device_gets_contiguous_memory(view):
    """GPU kernels use the address alone."""
    sent = []

    def send(flat, device):
        sent.append(flat)
        return flat

    quantize_tensor(view(torch.randn(200)), key="w", placement=Placement(send=send))
    assert [flat.is_contiguous() for flat in sent] == [True]


def test_the_sent_tensor_is_the_one_that_is_quantized():
    x = torch.randn(64, 64)
    q = quantize_tensor(x, key="w", seed=1, placement=Placement(send=lambda flat, device: -flat))
    assert torch.equal(q.codes.view(torch.uint8), quantize_tensor(-x, key="w", seed=1).codes.view(torch.uint8))
