"""python -m hostile (in tests/): the fuzzer alone, for long runs and to repeat one execution."""

import argparse
import concurrent.futures
import multiprocessing
import os

import conftest  # noqa: F401 - loads the pack
from hostile.fuzz import TARGETS, Fuzzer, Outcome

AT_ONCE = 2000
"""Executions that a process does before it reports."""


def work(task):
    """The outcome of one stretch of executions, in a process of the pool."""
    target, seed, start, stop = task
    with Fuzzer(seed) as fuzzer:
        return fuzzer.run(target, range(start, stop))


def fuzz(target, seed, executions, jobs):
    """The outcome of many executions in several processes."""
    tasks = [(target, seed, at, min(at + AT_ONCE, executions)) for at in range(0, executions, AT_ONCE)]
    total, seconds = Outcome(), 0.0
    context = multiprocessing.get_context("fork")  # which keeps the pack loaded
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        for outcome in pool.map(work, tasks):
            total.add(outcome)
            seconds += outcome.seconds
    total.seconds = seconds / jobs
    return total


def main():
    parser = argparse.ArgumentParser(prog="python -m hostile", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="header", help="what is damaged; default: header")
    parser.add_argument("--executions", type=int, default=10_000_000, metavar="N", help="default: 10,000,000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes; default: one per core"
    )
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat this execution, with its traceback")
    options = parser.parse_args()
    if options.only is None:
        print(fuzz(options.target, options.seed, options.executions, options.jobs))
    else:
        with Fuzzer(options.seed) as fuzzer:
            print(fuzzer.execute(options.target, options.only))


if __name__ == "__main__":
    main()
