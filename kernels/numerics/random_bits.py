"""Counter-based random words: a pure function of (seed, rounding, tensor key, flat index).

There is no generator and no state, so chunk size, thread count, strides and device do not change a byte.

A tensor is split into blocks of 2^17 elements. A block has two 32-bit keys and 2^16 words of 32 bits. Word j serves
elements j (low 16 bits) and j + 2^16 (high 16 bits) of the block; both halves are contiguous, which vectorizes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

LANE = 1 << 16
"""Elements in one half of a block; also the number of values of a 16-bit random word."""
BLOCK = 2 * LANE

# Odd multipliers: the golden ratio of Fibonacci hashing, and the two of Wellons' lowbias32 (hash-prospector, 2018).
SPREAD, MIX_1, MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
MIX_SHIFT = 15

# SplitMix64: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014).
SPLITMIX_GAMMA, SPLITMIX_1, SPLITMIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def stream_key(seed: int, rounding: str, tensor_key: str) -> int:
    """The 64-bit key of a tensor's stream of words. Raises ValueError unless 0 <= seed < 2^64."""
    if not 0 <= seed <= _MASK_64:
        raise ValueError(f"seed {seed} is out of range: choose one from 0 to {_MASK_64}")
    identity = f"{seed}\0{rounding}\0{tensor_key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")


def stream_from(stream: int, block: int) -> int:
    """The key of the stream that starts at `block` of a stream: SplitMix64 depends on key + position * gamma alone."""
    return (stream + block * SPLITMIX_GAMMA) & _MASK_64


def block_keys(stream: int, first_block: int, blocks: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The two 32-bit keys of each of `blocks` blocks, int32 (blocks, 2): SplitMix64 at positions first_block, ..."""
    words = [_splitmix64(stream, block) for block in range(first_block, first_block + blocks)]
    pairs = [(signed_32(word), signed_32(word >> 32)) for word in words]
    return torch.tensor(pairs, dtype=torch.int32, device=device).reshape(blocks, 2)


def fill_words(keys: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Write the words of some blocks into two int32 buffers of shape (blocks, width), width <= 2^16.

    `low` is for elements 0..width-1 of each block, `high` for elements 2^16..2^16+width-1. Words are in 0..65535.
    A right shift of int32 copies the sign bit in. Between the two multiplications this loses one bit of state, which
    the statistical tests do not detect, and saves a pass.
    """
    counter = _spread_counters(low.device)[: low.shape[1]]
    torch.bitwise_xor(counter, keys[:, :1], out=low)
    torch.add(keys[:, 1:], low, alpha=signed_32(MIX_1), out=low)
    torch.bitwise_right_shift(low, MIX_SHIFT, out=high)
    low.bitwise_xor_(high).mul_(signed_32(MIX_2))
    torch.bitwise_right_shift(low, 16, out=high)
    low.bitwise_xor_(high).bitwise_and_(LANE - 1)
    high.bitwise_and_(LANE - 1)


def random_words(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The words of elements start..start+count-1 of a tensor: int32 (count,), in 0..65535."""
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    words = torch.empty((last - first, 2, LANE), dtype=torch.int32, device=device)
    fill_words(block_keys(stream, first, last - first, device), words[:, 0], words[:, 1])
    return words.reshape(-1)[start - first * BLOCK :][:count]


class Words:
    """The words of one chunk after another, in buffers that are reused for every chunk."""

    def __init__(self, stream: int, blocks: int, width: int):
        """For chunks of up to `blocks` blocks, `width` elements in each half of a block."""
        self.stream = stream
        self.low, self.high = torch.empty((2, blocks, width), dtype=torch.int32, device="cpu")

    def fill(self, first_block: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of some blocks, as fill_words: (low, high), int32 (blocks, width) each."""
        low, high = self.low[:blocks], self.high[:blocks]
        fill_words(block_keys(self.stream, first_block, blocks), low, high)
        return low, high


def signed_32(word: int) -> int:
    """The low 32 bits of an integer, read as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _splitmix64(key: int, position: int) -> int:
    word = (key + (position + 1) * SPLITMIX_GAMMA) & _MASK_64
    word = (word ^ (word >> 30)) * SPLITMIX_1 & _MASK_64
    word = (word ^ (word >> 27)) * SPLITMIX_2 & _MASK_64
    return word ^ (word >> 31)


@lru_cache(maxsize=8)
def _spread_counters(device: torch.device) -> torch.Tensor:
    return torch.arange(LANE, dtype=torch.int32, device=device).mul_(signed_32(SPREAD))
