"""Saver: beside the caller, one at a time, and no failure is lost. Events decide the order, not time."""

import threading

import pytest

from orchestrator.runs.checkpoints.saver import Saver

LIMIT_S = 30.0


def test_the_caller_goes_on_while_it_is_written_and_the_next_waits() -> None:
    saver, may_end, order = Saver(), threading.Event(), list[str]()

    def first() -> None:
        assert may_end.wait(LIMIT_S)
        order.append("first")

    saver.begin(first)
    order.append("a step")
    threading.Timer(0.0, may_end.set).start()
    saver.begin(lambda: order.append("second"))
    saver.wait()
    assert order == ["a step", "first", "second"]


def test_a_failure_is_raised_once_by_whoever_waits_next() -> None:
    saver, order = Saver(), list[str]()

    def fail() -> None:
        raise OSError("full")

    saver.begin(fail)
    with pytest.raises(OSError, match="full"):
        saver.begin(lambda: order.append("not begun"))
    assert order == []
    saver.wait()
    saver.begin(lambda: order.append("begun"))
    saver.wait()
    assert order == ["begun"]
