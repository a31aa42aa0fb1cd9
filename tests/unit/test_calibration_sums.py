"""Where recorded inputs are kept: rows or sums, on a GPU or in main memory (simulated streams), in temporary files."""

import dataclasses
import errno
import gc
import logging
import mmap
import os
import sys

import pytest
import torch
from stochastic_fp8_pack.kernels.calibration import mapped, recorder, sums
from stochastic_fp8_pack.kernels.calibration.file import load_calibration, save_calibration
from stochastic_fp8_pack.kernels.calibration.mapped import mapped_memory
from stochastic_fp8_pack.kernels.calibration.moments import Calibration, moment_size
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.errors import ActivationError
from stochastic_fp8_pack.kernels.numerics.matrix_precision import exact_products, full_precision_products
from unit.test_transfers import cuda  # noqa: F401

KEY = "layer.weight"


def rows(count, width=64, seed=0, dtype=torch.float32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def recorded(*calls, **options):
    seen = ActivationRecorder(**options)
    for x in calls:
        seen.observe(KEY, x)
    return seen.result("prompts")


def mean_of_products(*calls):
    x = torch.cat(calls).double()
    return x.mT @ x / len(x)


def check(layer, *calls):
    torch.testing.assert_close(layer.moment()[0].double(), mean_of_products(*calls), rtol=1e-4, atol=1e-4)
    assert (layer.rows, layer.amax) == (sum(map(len, calls)), max(float(x.float().abs().max()) for x in calls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_kept_as_they_are(dtype):
    calls = [rows(1, dtype=dtype, seed=seed) for seed in range(5)]
    layer = recorded(*calls).layers[KEY]
    assert torch.equal(layer.kept, torch.cat(calls)) and layer.kept.dtype == dtype
    assert layer.nbytes == 5 * 64 * dtype.itemsize < 4 * moment_size(64)
    check(layer, *calls)


def test_many_rows_are_summed():
    """Kept at first, and summed when they would take a quarter of the memory of the sums."""
    calls = [rows(10, seed=seed) for seed in range(6)]
    layers = [recorded(*calls[:n]).layers[KEY] for n in (1, 2, 6)]
    assert [layer.kept is None for layer in layers] == [False, True, True]
    assert layers[2].nbytes == 4 * moment_size(64)
    for n, layer in zip((1, 2, 6), layers, strict=True):
        check(layer, *calls[:n])


def test_kept_rows_do_not_change_with_the_tensor_they_came_from():
    x = rows(3)
    seen = ActivationRecorder()
    seen.observe(KEY, x)
    expected = x.clone()
    x.zero_()
    assert torch.equal(seen.result().layers[KEY].kept, expected)


def test_added_rows_stay_rows_while_they_are_few():
    one, other, many = rows(3, seed=1), rows(4, seed=2), rows(200, seed=3)
    both = recorded(one) + recorded(other)
    assert torch.equal(both.layers[KEY].kept, torch.cat([one, other]))
    check(both.layers[KEY], one, other)
    more = both + recorded(many)
    assert more.layers[KEY].kept is None
    check(more.layers[KEY], one, other, many)
    grown = recorded(one)
    for _ in range(5):
        grown = grown + grown
    assert grown.layers[KEY].kept is None, "96 rows take more memory than their moment"


def test_kept_rows_are_multiplied_where_the_moment_is_needed():
    """Between the codes of a model, their moments would leave gaps in main memory."""

    def in_main_memory():
        raise AssertionError("the moment of kept rows was computed in main memory")

    layer = dataclasses.replace(recorded(rows(3)).layers[KEY], read_moment=in_main_memory)
    check(layer, rows(3))
    assert layer.moment("meta").device.type == "meta"


def test_kept_rows_are_saved_as_a_moment(tmp_path):
    calibration = recorded(rows(3))
    save_calibration(calibration, tmp_path / "c.safetensors")
    check(load_calibration(tmp_path / "c.safetensors").layers[KEY], rows(3))


def test_sums_lie_where_the_caller_wants_them():
    given = []

    def store(count):
        given.append(torch.full((count,), float("nan")))
        return given[-1]

    seen = ActivationRecorder(store=store)
    for x in (rows(100), rows(50, seed=1)):
        seen.observe(KEY, x)
    assert len(given) == 1, "they are not in ordinary memory first"
    calibration = seen.result("prompts")
    assert calibration.layers[KEY].read_moment().data_ptr() == given[0].data_ptr()
    both = calibration.plus(recorded(rows(70, seed=2)), store)
    assert both.layers[KEY].read_moment().data_ptr() == given[1].data_ptr()
    check(calibration.layers[KEY], rows(100), rows(50, seed=1))
    check(both.layers[KEY], rows(100), rows(50, seed=1), rows(70, seed=2))


# Sums in main memory for inputs on a GPU


@pytest.fixture
def ferry(cuda, monkeypatch):  # noqa: F811
    """A ferry whose streams, the current one included, run only when someone waits for them."""
    add = sums.add_products
    monkeypatch.setattr(sums, "add_products", lambda *arguments: cuda[0].add(lambda: add(*arguments)))
    return sums.Ferry(torch.device("cpu"))


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_sums_visit_the_gpu_and_come_back(ferry, layers):
    """More layers than buffers or fewer, of different sizes, each added to several times."""
    widths = [(16, 48, 32)[i % 3] for i in range(layers)]
    there = [sums.FerriedSums(width, ferry, sums.not_pinned) for width in widths]
    for call in range(4):
        for i, each in enumerate(there):
            each.add(rows(5, widths[i], seed=10 * call + i))
    ferry._outbound.synchronize()  # before the others: nothing may leave before it has arrived
    ferry.finish()
    for i, each in enumerate(there):
        x = torch.cat([rows(5, widths[i], seed=10 * call + i) for call in range(4)])
        torch.testing.assert_close(each.packed.view(widths[i], widths[i]), x.mT @ x)


def test_sums_in_main_memory_are_pinned_until_they_are_stored(ferry):
    events = []

    def pin(tensor):
        events.append("pin")
        return lambda: events.append("unpin")

    there = sums.FerriedSums(16, ferry, pin)
    there.add(rows(5, 16))
    ferry.finish()
    assert events == ["pin"]
    there.stored()
    assert events == ["pin", "unpin"]


def test_pinned_sums_move_and_others_lie_in_the_store_from_the_start(ferry):
    """Pinned memory cannot be taken back, and memory in a file cannot always be pinned."""
    given = []

    def store(count):
        given.append(torch.full((count,), float("nan")))
        return given[-1]

    for pin, early in ((lambda tensor: lambda: None, 0), (sums.not_pinned, 1)):
        there = sums.FerriedSums(16, ferry, pin, store)
        assert len(given) == early
        there.add(rows(5, 16))
        ferry.finish()
        result = there.stored()
        assert result.data_ptr() == given[-1].data_ptr()
        torch.testing.assert_close(result.view(16, 16), rows(5, 16).mT @ rows(5, 16))
        given.clear()


def test_a_recording_that_fails_gives_its_pinned_memory_back(ferry):
    """Memory that is freed while it is pinned breaks later transfers."""
    pinned = set()

    def pin(tensor):
        pinned.add(tensor.data_ptr())
        return lambda: pinned.remove(tensor.data_ptr())

    with pytest.raises(ActivationError), ActivationRecorder() as seen:
        for key in ("a", "b"):
            layer = seen._layers[key] = recorder._Recorded(64)
            layer.sums = sums.FerriedSums(64, ferry, pin)
            layer.sums.add(rows(5))
        seen._ferries[torch.device("cuda:0")] = ferry
        assert len(pinned) == 2
        raise ActivationError("the inputs hold NaN")
    assert pinned == set()


def test_pinned_memory_has_pages_of_its_own(ferry):
    there = [sums.FerriedSums(16, ferry, sums.not_pinned).packed for _ in range(3)]
    assert all(each.data_ptr() % mmap.PAGESIZE == 0 and not each.any() for each in there)
    assert len({each.data_ptr() for each in there}) == 3


def test_the_gpu_keeps_as_many_sums_as_it_has_room_for():
    """ComfyUI is asked for room on CUDA devices only."""
    seen = ActivationRecorder(room=lambda device: 2 * 4 * moment_size(64) + 100)
    gpu = torch.device("cuda:0")
    size = 4 * moment_size(64)
    places = [seen._place(gpu, size).type for _ in range(3)] + [seen._place(gpu, 100).type, seen._place(gpu, 1).type]
    assert places == ["cuda", "cuda", "cpu", "cuda", "cpu"]
    assert seen._place(torch.device("mps"), 1).type == "cpu"


# Bad inputs on a GPU, which are found later


def test_the_first_layer_with_bad_inputs_is_named():
    seen = ActivationRecorder()
    for key, value in (("a.weight", 1.0), ("b.weight", float("nan")), ("c.weight", float("nan"))):
        layer = seen._layers[key] = recorder._Recorded(16)
        layer.amax = torch.tensor(value)
    with pytest.raises(ActivationError, match="the inputs of layer 'b' hold NaN or infinite values: the model"):
        seen.result()


# Temporary files


def test_mapped_memory_is_memory(tmp_path):
    numbers = mapped_memory(tmp_path / "temp", 1000)
    numbers.copy_(torch.arange(1000.0))
    assert torch.equal(numbers, torch.arange(1000.0))
    assert numbers.is_contiguous() and numbers.dtype == torch.float32


@pytest.mark.posix
def test_the_file_has_no_name_and_goes_with_the_tensor(tmp_path):
    numbers = mapped_memory(tmp_path, 5000)
    assert os.listdir(tmp_path) == []
    if sys.platform == "linux":
        assert mappings() == 1
        view = numbers[100:]
        del numbers
        gc.collect()
        assert mappings() == 1, "a view still uses it"
        del view
        gc.collect()
        assert mappings() == 0


def mappings():
    with open("/proc/self/maps") as file:
        return sum(mapped.PREFIX in line for line in file)


@pytest.mark.posix
def test_a_full_disk_means_ordinary_memory(tmp_path, monkeypatch, caplog):
    """Writing to a mapped file on a full disk would kill the process."""

    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        numbers = mapped_memory(tmp_path, 1 << 20)
    numbers.fill_(1)
    assert os.listdir(tmp_path) == []
    assert "a calibration of 4.19 MB stays in main memory" in caplog.text and "No space left" in caplog.text


def test_without_a_way_to_reserve_room_a_nearly_full_disk_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert mapped_memory(tmp_path, 100).numel() == 100
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 500}))
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        mapped_memory(tmp_path, 100)
    assert "the disk is full" in caplog.text


# Products


def test_the_precision_of_products_is_set_and_restored():
    """TF32 only where it holds every bit: 16-bit values on a GPU."""

    class OnGPU:
        is_cuda, device = True, torch.device("cpu")

        def __init__(self, dtype):
            self.dtype = dtype

    torch.set_float32_matmul_precision("medium")
    try:
        for context, expected in (
            (full_precision_products(torch.device("cpu")), "highest"),
            (exact_products(torch.ones(1, dtype=torch.bfloat16)), "highest"),
            (exact_products(OnGPU(torch.bfloat16)), "high"),
            (exact_products(OnGPU(torch.float16)), "high"),
            (exact_products(OnGPU(torch.float32)), "highest"),
        ):
            with context:
                assert torch.get_float32_matmul_precision() == expected
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# Progress of saving


def test_saving_counts_both_readings_and_can_be_cancelled(tmp_path):
    calibration = Calibration({f"{i}.weight": recorded(rows(100)).layers[KEY] for i in range(3)})
    seen, size = [], 4 * moment_size(64)
    save_calibration(calibration, tmp_path / "a.safetensors", progress=lambda *call: seen.append(call))
    assert [done for done, _, _ in seen] == [0, size, 2 * size, 3 * size, 4 * size, 5 * size, 6 * size]
    assert {total for _, total, _ in seen} == {6 * size}

    class Cancelled(Exception):
        pass

    def cancel(done, total, key):
        if done >= 4 * size:
            raise Cancelled

    with pytest.raises(Cancelled):
        save_calibration(calibration, tmp_path / "b.safetensors", progress=cancel)
    assert os.listdir(tmp_path) == ["a.safetensors"]
