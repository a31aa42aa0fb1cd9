"""Patterns made to be slow take a bounded time: a small multiple of looking up each of their characters in each name.

A matcher that backtracks takes more than a thousand times as long. `make bench` measures the time itself.
"""

import contextlib
import random
import time
from functools import cache

import pytest
from hostile.amounts import amount
from stochastic_fp8_pack.kernels import StochasticFP8Error
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection.patterns import Pattern, PatternSet
from stochastic_fp8_pack.kernels.selection.selection import select_layers

LENGTH = 1000
NAMES = 10_000
LONGEST_NAME = 200
REPEATS = 2
"""The shortest time counts, since other programs run at the same time."""
SLACK = 8
"""Times that bound. Other programs share the processor's caches, and count as the test's own time."""
SAMPLE = 50
"""Characters that are really looked up; the bound is as many times that as the pattern is longer."""


def fill(piece, end=""):
    """A pattern of LENGTH characters: a piece again and again, then an end."""
    return (piece * LENGTH)[: LENGTH - len(end)].rstrip(".") + end


BOMBS = {
    "stars": fill("*"),
    "stars and a letter": fill("*", "b"),
    "letter and star": fill("a*", "b"),
    "star and letter": fill("*a", "*"),
    "two letters and star": fill("ab*", "c"),
    "parts of a star": fill("*."),
    "parts of letter and star": fill("a*."),
    "parts of many stars": fill("**a**."),
    "one part": fill("a"),
    "many parts": fill("a."),
    "numbers": fill("9."),
    "negative numbers": fill("-1."),
    "negative numbers of stars": fill("*.-1."),
    "a few negative numbers": "-1." * 2 + fill("*.")[:900],
    "a long negative number": "-" + fill("9")[1:],
    "characters of regular expressions": fill("(a+)+$|[^.]*\\"),
    "characters beyond ASCII": fill("é*"),
}


@cache
def names_of(kind, seed):
    """Names of up to LONGEST_NAME characters, all different, that suit the bombs badly."""
    rng = random.Random(seed)
    make = {
        "letters": lambda: "a" * rng.randint(1, LONGEST_NAME),
        "parts": lambda: "a." * rng.randint(1, LONGEST_NAME // 2),
        "pairs": lambda: "ab" * rng.randint(1, LONGEST_NAME // 2),
        "numbers": lambda: f"blocks.{rng.randrange(10**6)}." * rng.randint(1, 12),
        "random": lambda: "".join(rng.choices("ab.*0-", k=rng.randint(1, LONGEST_NAME))),
    }[kind]
    return [f"{make()[: LONGEST_NAME - 8]}.{number}" for number in range(NAMES)]


KINDS = amount(("letters", "parts"), ("letters", "parts", "pairs", "numbers", "random"))


def shortest_time(function, arguments):
    """Seconds of processor time of the fastest of several calls."""
    times = []
    for argument in arguments:
        began = time.process_time()
        function(argument)
        times.append(time.process_time() - began)
    return min(times)


def look_up(names):
    for character in fill("ab.*0-9x")[:SAMPLE]:
        for name in names:
            character in name  # noqa: B015


@cache
def bound(kind):
    """SLACK times the seconds to look up LENGTH characters in each name, one by one."""
    return SLACK * LENGTH / SAMPLE * shortest_time(look_up, [names_of(kind, seed) for seed in range(REPEATS)])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_matching_takes_a_bounded_time(bomb, kind):
    def match(names):
        with contextlib.suppress(StochasticFP8Error):  # refused
            pattern = Pattern.parse(BOMBS[bomb]).resolve(names)
            matching = PatternSet([pattern]).matching
            for name in names:
                matching(name)

    seconds = shortest_time(match, [names_of(kind, seed) for seed in range(REPEATS)])
    print(f"{seconds:.3f} s; {seconds / bound(kind):.2f} of the bound")
    assert seconds <= bound(kind)


@cache
def tensors_of(kind, seed):
    return {name: TensorInfo("bfloat16", (16, 16)) for name in names_of(kind, seed)}


def choose(tensors, **patterns):
    try:
        select_layers(tensors, **patterns)
    except StochasticFP8Error as error:
        assert len(str(error)) < 2 * LENGTH


@cache
def time_without_patterns(kind):
    return shortest_time(choose, [tensors_of(kind, seed) for seed in range(REPEATS)])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("field", amount(["keep"], ["keep", "only"]))
@pytest.mark.parametrize("bomb", amount(["letter and star", "negative numbers", "many parts"], BOMBS))
def test_choosing_layers_takes_a_bounded_time(bomb, field):
    """Together with the search for similar names, where a pattern matches nothing."""
    seconds = shortest_time(
        lambda tensors: choose(tensors, **{field: [BOMBS[bomb]]}),
        [tensors_of("parts", seed) for seed in range(REPEATS)],
    )
    seconds -= time_without_patterns("parts")
    print(f"{seconds:.3f} s; {seconds / bound('parts'):.2f} of the bound")
    assert seconds <= bound("parts")


def test_many_bombs_together_are_bounded():
    """64 patterns of 1,000 characters, the most that one request may have."""
    bombs = [f"{fill('a*')[:-3]}{number:03}" for number in range(64)]
    seconds = shortest_time(lambda tensors: choose(tensors, keep=bombs), [tensors_of("letters", 0)])
    assert seconds <= len(bombs) * bound("letters")
