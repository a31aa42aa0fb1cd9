"""Damaged files are read or refused: no other exception leaves the library."""

import random

import pytest
from hostile.amounts import amount
from hostile.damage import Document, damaged_bytes
from hostile.fuzz import TARGETS, Fuzzer

EXECUTIONS = {
    "header": amount(8_000, 500_000),
    "contents": amount(600, 30_000),
    "entries": amount(600, 20_000),
    "index": amount(1_000, 40_000),
    "calibration": amount(800, 20_000),
}
SHARES = 8
"""Parts of a target's executions, so that two processes share them."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("target", TARGETS)
def test_no_uncaught_exception(target, share):
    with Fuzzer() as fuzzer:
        outcome = fuzzer.run(target, range(share, EXECUTIONS[target], SHARES))
    print(f"{target}: {outcome}")
    assert not outcome.faults, f"repeat them in tests/:\n{outcome}"
    assert outcome.counts["done"], "every file was refused: the damage no longer reaches beyond the first check"


def test_an_execution_can_be_repeated():
    with Fuzzer() as one, Fuzzer() as other:
        for target in TARGETS:
            for number in range(20):
                one.run(target, [number])
                first = one.file.read_bytes()
                other.run(target, [number])
                assert other.file.read_bytes() == first, (target, number)


def test_damage_changes_the_text():
    document = Document({"a": [1, {"b": "c"}], "d": None})
    assert document.text == '{"a":[1,{"b":"c"}],"d":null}'
    texts = {document.damaged(random.Random(seed)) for seed in range(1000)}
    assert len(texts) > 500
    assert len({damaged_bytes(random.Random(seed), b"0123456789") for seed in range(1000)}) > 300
