"""Compiled segments: what worker threads share."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.runners.executing.chip import SegmentLibrary


@pytest.fixture
def program(tiny_program: Callable[..., Any]) -> Any:
    return tiny_program(tp=2)


@pytest.fixture
def threads_take_turns(program: Any) -> Iterator[None]:
    """Garbage is collected often, and what looks on then (as test tools do) lets another thread go on."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()

    def look_on(phase: str, info: dict[str, int]) -> None:
        sum(range(2000))

    sys.setswitchinterval(1e-6)
    gc.set_threshold(3)
    gc.callbacks.append(look_on)
    yield
    gc.callbacks.remove(look_on)
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)


def test_threads_that_need_segments_at_once_all_get_them(program: Any, threads_take_turns: None) -> None:
    failures: list[BaseException] = []

    def take_all(library: SegmentLibrary, order: range) -> None:
        try:
            for index in order:
                library.function(index)
        except BaseException as error:
            failures.append(error)

    for library in (SegmentLibrary(program, "cpu"), SegmentLibrary(program, "cpu")):
        first = range(len(program.segments))
        threads = [threading.Thread(target=take_all, args=(library, order)) for order in (first, first[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
