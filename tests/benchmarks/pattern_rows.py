"""Patterns made to be slow: the time to match one of 1,000 characters with 10,000 names of up to 200."""

import contextlib
import time

from hostile.test_patterns import BOMBS, LONGEST_NAME, NAMES, names_of
from measure import Row, duration
from stochastic_fp8_pack.kernels import StochasticFP8Error
from stochastic_fp8_pack.kernels.selection import patterns
from stochastic_fp8_pack.kernels.selection.patterns import Pattern, PatternSet

AT_MOST = 0.1
"""Seconds of processor time."""
EVERY_KIND = ("letters", "parts", "pairs", "numbers", "random")


def rows(rounds):
    for kind in EVERY_KIND:
        seconds, bomb = max((shortest(bomb, kind, rounds), bomb) for bomb in BOMBS)
        what = f"{NAMES:,} names of up to {LONGEST_NAME} characters ({kind}), slowest of {len(BOMBS)} patterns: {bomb}"
        yield Row(what, duration(seconds), "", "", f"<= {duration(AT_MOST)}", seconds <= AT_MOST)


def shortest(bomb, kind, rounds):
    """Seconds of processor time of the fastest round. Each round has other names, which no cache holds."""
    times = []
    for seed in range(rounds):
        names = names_of(kind, seed)
        patterns._split_cached.cache_clear()
        began = time.process_time()
        with contextlib.suppress(StochasticFP8Error):  # refused
            matching = PatternSet([Pattern.parse(BOMBS[bomb]).resolve(names)]).matching
            for name in names:
                matching(name)
        times.append(time.process_time() - began)
    return min(times)
