"""Random words: pinned, a pure function of the index, uniform, and uncorrelated along the structures of weights."""

import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels.numerics.random_bits import BLOCK, LANE, random_words, stream_from, stream_key

BLOCKS = 96
LAGS = (*range(1, 65), 128, 256, 512, 640, 768, 1024, 1152, 1280, 2048, 3072, 4096, 5120, 9216, 12288, LANE, BLOCK)


def words(seed=0, rounding="stochastic", key="blocks.0.attn.qkv.weight", start=0, count=BLOCKS * BLOCK):
    return random_words(stream_key(seed, rounding, key), start, count).numpy()


@pytest.fixture(scope="module")
def sample():
    return words()


def correlation(a, b):
    """Pearson's r times sqrt(n), which is a standard normal for independent words."""
    a, b = a.astype(np.float64) - 32767.5, b.astype(np.float64) - 32767.5
    return (a @ b) / np.sqrt((a @ a) * (b @ b)) * np.sqrt(len(a))


def test_golden_words():
    assert stream_key(0, "stochastic", "w") == 0xA2C6B75A40EE75E1
    assert words(key="w", count=4).tolist() == [39988, 38792, 52867, 25728]
    assert words(key="w", start=LANE, count=4).tolist() == [61175, 55979, 54869, 41301]
    assert words(key="w", start=(1 << 33) + 5, count=3).tolist() == [11262, 58006, 8238]


@pytest.mark.parametrize("start", [0, 1, LANE - 1, LANE, BLOCK - 3, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("count", [0, 1, 2, 1000, LANE + 1])
def test_a_slice_has_the_words_of_the_whole(sample, start, count):
    np.testing.assert_array_equal(words(start=start, count=count), sample[start : start + count])


def test_a_stream_can_start_at_any_block():
    later = random_words(stream_from(12345, 3), 0, 1000)
    np.testing.assert_array_equal(later, random_words(12345, 3 * BLOCK, 1000))
    assert 0 <= stream_from(2**64 - 1, 10**6) < 2**64


def test_distant_indices_have_different_words():
    far = words(start=1 << 40, count=1000)
    assert far.min() >= 0
    assert far.max() < 65536
    assert len(set(far.tolist())) > 950
    assert not np.array_equal(far, words(start=0, count=1000))


@pytest.mark.parametrize("lane", [0, 1])
def test_words_are_uniform(sample, lane):
    counts = np.bincount(sample.reshape(BLOCKS, 2, LANE)[:, lane].ravel(), minlength=LANE)
    chi_square = ((counts - BLOCKS) ** 2 / BLOCKS).sum()
    assert len(counts) == LANE
    assert abs(chi_square - (LANE - 1)) < 5 * np.sqrt(2 * (LANE - 1))


@pytest.mark.parametrize("lane", [0, 1])
def test_words_within_a_block_repeat_as_often_as_random_ones(sample, lane):
    """A counter that is mixed too weakly gives a permutation, which is too uniform."""
    scores = []
    for block in sample.reshape(BLOCKS, 2, LANE)[:, lane]:
        counts = np.bincount(block, minlength=LANE)
        scores.append((((counts - 1) ** 2).sum() - (LANE - 1)) / np.sqrt(2 * (LANE - 1)))
    assert abs(np.mean(scores)) < 5 / np.sqrt(BLOCKS)
    assert 0.6 < np.std(scores) < 1.4


@pytest.mark.parametrize("lag", LAGS)
def test_no_correlation_along_rows_and_columns(sample, lag):
    assert abs(correlation(sample[:-lag], sample[lag:])) < 5


def test_no_correlation_between_any_two_bits_at_short_distances(sample):
    bits = ((sample[: 1 << 21, None] >> np.arange(16)) & 1).astype(np.float32) * 2 - 1
    for lag in (0, 1, 2, 3, 8, 64, 128):
        n = len(bits) - lag
        scores = bits[:n].T @ bits[lag:] / np.sqrt(n)
        if lag == 0:
            scores -= np.diag(np.diag(scores))
        assert np.abs(scores).max() < 6


def test_no_correlation_between_the_lanes(sample):
    lanes = sample.reshape(BLOCKS, 2, LANE)
    assert abs(correlation(lanes[:, 0].ravel(), lanes[:, 1].ravel())) < 5


@pytest.mark.parametrize("seed", [*range(1, 9), 2**31, 2**32, 2**63, 2**64 - 1])
def test_seeds_are_independent(sample, seed):
    assert abs(correlation(sample[: 1 << 20], words(seed=seed, count=1 << 20))) < 5


@pytest.mark.parametrize("rounding", ["owlshift", "complex_neighbor", "shift_perturb"])
def test_methods_are_independent(sample, rounding):
    assert abs(correlation(sample[: 1 << 20], words(rounding=rounding, count=1 << 20))) < 5


@pytest.mark.parametrize("key", ["blocks.1.attn.qkv.weight", "blocks.0.attn.qkv.weigh", "", "ключ.weight", "\udcff"])
def test_tensor_keys_are_independent(sample, key):
    assert abs(correlation(sample[: 1 << 20], words(key=key, count=1 << 20))) < 5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(ValueError, match=f"seed {seed} is out of range"):
        stream_key(seed, "stochastic", "w")


def test_thread_count_does_not_change_the_words(sample):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        np.testing.assert_array_equal(words(count=5 * BLOCK), sample[: 5 * BLOCK])
    finally:
        torch.set_num_threads(threads)
