"""Background: tasks on one other thread."""

import threading

import pytest
from stochastic_fp8_pack.kernels.files.background import Background


def test_tasks_run_one_at_a_time_in_order():
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


def test_an_error_is_raised_by_the_next_call():
    with Background("test") as background:
        background.run(int, "x")
        with pytest.raises(ValueError, match="invalid literal"):
            background.run(print)
        background.wait()


def test_leaving_waits_for_the_last_task_and_raises_its_error():
    done = []
    with Background("test") as background:
        background.run(done.append, 1)
    assert done == [1]
    with pytest.raises(ValueError, match="invalid literal"), Background("test") as background:
        background.run(int, "x")
    with pytest.raises(KeyError), Background("test") as background:
        background.run(int, "x")
        raise KeyError("the first error counts")
