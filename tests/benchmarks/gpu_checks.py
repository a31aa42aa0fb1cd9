"""Checks on a GPU: the CPU's bytes, statistics and errors, for every size, layout, stream and amount of memory."""

import logging
import multiprocessing
import os
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import conftest  # noqa: F401  (loads the pack)
import torch
import triton
import triton.language as tl
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, SCALINGS, NonFiniteError, quantize_tensor
from stochastic_fp8_pack.kernels.numerics.backends import Task, cpu, nvidia, reference, triton_kernels
from stochastic_fp8_pack.kernels.numerics.random_bits import BLOCK, stream_from, stream_key
from stochastic_fp8_pack.kernels.numerics.scaling import amax_to_scale
from stochastic_fp8_pack.kernels.numerics.transfers import (
    PIECE_BYTES,
    PIECES_IN_FLIGHT,
    STAGED_BYTES,
    Prefetcher,
    begin_transfer,
    copy,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SIZES = [0, 1, 2, 3, 1000, 65535, 65536, 65537, 131071, 131072, 131073, 262144 + 65536 + 5, 1_000_003, 3072 * 1024 + 1]
DRAWS = 2
POISON = 0xA5
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
COUNTED = ("count", "saturated", "flushed", "exact", "amax", "step_histogram", "relative_histogram")


def heavy_tailed(n, dtype):
    """New random weights with outliers, tiny values, both zeros and powers of two, drawn on the GPU for speed."""
    with torch.device("cuda"):
        values = torch.randn(n, dtype=torch.float64) * torch.exp(2 * torch.randn(n, dtype=torch.float64))
        powers = torch.exp2(torch.randint(-40, 10, (n,)).double())
        kinds = torch.rand(n)
    for share, special in ((0.09, powers), (0.04, -0.0), (0.02, 0.0)):
        values = torch.where(kinds < share, special, values)
    return (values * random.choice([1.0, 1e-6, 0.02, 3.0])).clamp(-6e4, 6e4).to(DTYPES[dtype]).cpu()


def grid():
    """Check every format, rounding and dtype, each in its own process (most of the time is compilation)."""
    combinations = list(product(DTYPES, FORMATS, ROUNDINGS))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(check_combination, combinations), Counter())


def check_combination(combination):
    dtype, format, rounding = combination
    torch.set_num_threads(1)
    torch.seed()
    found = Counter()
    for n, scaling, _ in product(SIZES, SCALINGS, range(DRAWS)):
        x, seed = heavy_tailed(n, dtype), random.getrandbits(64)
        found += _compare(x, FORMATS[format], ROUNDINGS[rounding], SCALINGS[scaling], stream_key(seed, rounding, "k"))
    return found


def _compare(x, float8, rounding, scaling, stream):
    on_gpu = x.cuda()
    amax = nvidia.tensor_to_amax(on_gpu)
    scale = amax_to_scale(amax, float8, scaling)
    task = Task(scale, amax, float8, rounding, stream)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    expected = cpu.quantize_slice(x, codes, task, True)
    found = Counter(tensors=1, elements=x.numel(), amax_differs=amax != reference.tensor_to_amax(x))
    for backend, statistics in ((nvidia, False), (nvidia, True), (reference, False)):
        result = _poisoned(x.numel())
        error = backend.quantize_slice(on_gpu, result, task, statistics)
        found["bytes"] += x.numel()
        found["bytes_differ"] += int((result.cpu() != codes).sum())
        if error is not None:
            found += _compare_statistics(error, expected)
    return found


def _compare_statistics(ours, expected):
    """Counts and histograms must be equal, sums within 1e-5 of the sum of magnitudes."""
    differ = [name for name in COUNTED if getattr(ours, name) != getattr(expected, name)]
    magnitude = (expected.count * expected.sum_squared_error) ** 0.5
    close = abs(ours.sum_error - expected.sum_error) <= 1e-5 * magnitude
    for name in ("sum_squared_error", "sum_squared", "max_error"):
        close &= abs(getattr(ours, name) - getattr(expected, name)) <= 1e-5 * abs(getattr(expected, name))
    return Counter(statistics=1, sums_differ=not close) + Counter(f"{name}_differs" for name in differ)


def _poisoned(n):
    """Memory for n codes, filled with another value, so that an unwritten byte shows."""
    return torch.full((n,), POISON, dtype=torch.uint8, device="cuda")


def layouts():
    """How many bytes differ for strided and offset tensors, any dimensions, another stream, and on every GPU."""
    x = heavy_tailed(1500 * 700, "bfloat16").reshape(1500, 700)
    side_stream = torch.cuda.Stream()
    views = [lambda t: t.T, lambda t: t[1:], lambda t: t.reshape(-1)[1:], lambda t: t[:, ::3], lambda t: t[7, 9]]
    views += [lambda t: t[:1].expand(9, -1), lambda t: t.reshape(2, 5, 150, 7, 100).permute(4, 0, 3, 1, 2)]
    differ = 0
    for view in views:
        expected = quantize_tensor(view(x), key="k", seed=3).codes
        on_gpu = x.cuda()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            differ += _differ(quantize_tensor(view(on_gpu), key="k", seed=3).codes, expected)
        differ += _differ(quantize_tensor(view(on_gpu), key="k", seed=3, device="cpu").codes, expected)
        for gpu in range(torch.cuda.device_count()):
            there = quantize_tensor(view(x).to(f"cuda:{gpu}"), key="k", seed=3, statistics=True)
            back = quantize_tensor(view(x), key="k", seed=3, device=f"cuda:{gpu}")
            differ += _differ(there.codes, expected) + _differ(back.codes, expected) + (there.codes.device.index != gpu)
    return differ


def beyond_int32():
    """(bytes compared, bytes that differ) around 2^31 and at both ends of a larger tensor."""
    n = 2**31 + 3 * BLOCK + 12345
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    for part in x.split(1 << 28):
        part.normal_(std=0.02)
    amax = nvidia.tensor_to_amax(x)
    float8, rounding, stream = FORMATS["float8_e4m3fn"], ROUNDINGS["stochastic"], stream_key(9, "stochastic", "k")
    scale = amax_to_scale(amax, float8, SCALINGS["absmax"])
    compared = differ = 0
    for statistics in (False, True):
        codes = _poisoned(n)
        error = nvidia.quantize_slice(x, codes, Task(scale, amax, float8, rounding, stream), statistics)
        for block in (0, 2**30 // BLOCK - 2, 2**31 // BLOCK - 8, random.randrange(2**14), n // BLOCK - 3):
            part = slice(block * BLOCK, block * BLOCK + 16 * BLOCK)
            task = Task(scale, amax, float8, rounding, stream_from(stream, block))
            expected = torch.empty(codes[part].shape, dtype=torch.uint8)
            cpu.quantize_slice(x[part].cpu(), expected, task, False)
            compared += expected.numel()
            differ += int((codes[part].cpu() != expected).sum())
    counted = sum(error.step_histogram) == n == sum(error.relative_histogram) + error.exact
    return compared, differ + (not counted)


def nonfinite():
    """Whether NaN and infinity are found and counted, for tensors on the GPU and tensors sent there."""
    right = 0
    for where, device, dtype in product((0, 70_000, 200_000), (None, "cuda"), DTYPES.values()):
        x = torch.randn(200_001).to(dtype)
        x[where], x[5] = float("nan"), -float("inf")
        try:
            quantize_tensor(x if device else x.cuda(), key="w", device=device)
        except NonFiniteError as error:
            right += (error.key, error.nan, error.inf) == ("w", 1, 1)
    return right == 24


def transfers():
    """Elements that differ after a copy to the GPU and back, from pageable, pinned and strided memory."""
    differ = 0
    pieces = (PIECES_IN_FLIGHT + 2) * PIECE_BYTES
    for nbytes in (4, STAGED_BYTES, STAGED_BYTES + 2, PIECE_BYTES, PIECE_BYTES + 2, pieces, pieces + 2):
        x = torch.randint(-(2**15), 2**15, (nbytes // 2,), dtype=torch.int16)
        for source in (x, x.pin_memory(), x.repeat_interleave(2)[::2], x.view(torch.bfloat16)):
            with Prefetcher(GPU) as prefetcher:
                prefetcher.prefetch(source)
                there = prefetcher(source, GPU)
            copied = copy(source, torch.empty_like(there))
            strided = there.repeat_interleave(2)[::2]
            codes = there.contiguous().view(torch.float8_e4m3fn)
            back = [begin_transfer(each, CPU) for each in (there, strided, codes, copied)]
            back = [arrival() for arrival in back] + [copy(there, torch.empty_like(source))]
            differ += sum(int((each.view(torch.int16) != x).sum()) for each in back)
    with Prefetcher(GPU) as prefetcher:
        prefetcher.prefetch(torch.ones(pieces, dtype=torch.uint8))
    reused = torch.zeros(pieces, dtype=torch.uint8, device=GPU)  # the memory of a tensor that was never consumed
    torch.cuda.synchronize()
    return differ + int(reused.sum())


def memory():
    """(peak GPU memory divided by the tensor's size, warnings and differing bytes with too little memory)."""
    x = (torch.randn(1 << 27) * 0.02).bfloat16()
    expected = quantize_tensor(x, key="k", statistics=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = quantize_tensor(x, key="k", statistics=True, device="cuda")
    peak = (torch.cuda.max_memory_allocated() - before) / x.nbytes
    differ = _differ(result.codes, expected.codes)
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("stochastic_fp8")
    logger.addHandler(handler)
    total = torch.cuda.get_device_properties(0).total_memory
    for budget in (x.nbytes // 2, 1 << 20):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + budget) / total)
        result = quantize_tensor(x, key="k", statistics=True, device="cuda")
        differ += _differ(result.codes, expected.codes) + (result.error.step_histogram != expected.error.step_histogram)
    torch.cuda.set_per_process_memory_fraction(1.0)
    logger.removeHandler(handler)
    return peak, warnings, differ


def _differ(codes, expected):
    return int((codes.cpu().view(torch.uint8) != expected.view(torch.uint8)).sum())


@triton.jit
def _wrong_quotients(first, wrong, X_BITS: tl.constexpr, TRIES: tl.constexpr, TILE: tl.constexpr):
    """Divide by TILE divisors in [1, 2): all x of X_BITS significant bits, or TRIES hashed ones of 24 bits."""
    index = first + tl.program_id(0) * TILE + tl.arange(0, TILE)
    divisor = (index + (127 << 23)).to(tl.float32, bitcast=True)
    reciprocal = tl.div_rn(1.0, divisor)
    count = tl.zeros((TILE,), tl.int32)
    for i in range(TRIES):
        if X_BITS < 24:
            x = (tl.zeros((TILE,), tl.int32) + i + TRIES).to(tl.float32)
        else:
            x = ((((index ^ i) * 0x7FEB352D) & 0x7FFFFF) + (127 << 23)).to(tl.float32, bitcast=True)
        quotient = triton_kernels._divide(x, divisor, reciprocal, X_BITS == 24)
        count += (quotient != tl.div_rn(x, divisor)).to(tl.int32)
    tl.atomic_add(wrong, tl.sum(count).to(tl.int64))


def divisions():
    """(x's significant bits, pairs tried, wrong quotients): every pair of significands for 16-bit sources."""
    for bits, tries in ((11, 1 << 10), (24, 1 << 12)):
        wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
        _wrong_quotients[((1 << 23) // 512,)](0, wrong, X_BITS=bits, TRIES=tries, TILE=512)
        yield bits, tries << 23, wrong.item()
