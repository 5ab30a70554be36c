"""What these tests share: runs of the command line in this process, and timelines made of values."""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from orchestrator import cli
from orchestrator.runners.signals import SIGNALS
from orchestrator.runners.timing import simulated
from orchestrator.runners.timing.simulated import SimulatedStep
from orchestrator.runners.timing.step_costs import StepCosts
from orchestrator.runs.timeline import Counter, Flow, Origin, Recorder, Span, Timeline
from partitioner.program.program import Program


class Ran(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def orchestrate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line with these words; the test process keeps its own handlers of signals."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["orchestrate", *map(str, words)])
        before = {each: signal.getsignal(each) for each in SIGNALS}
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        for each, handler in before.items():
            signal.signal(each, handler)
        assert stopped.value.code is None or isinstance(stopped.value.code, int)
        return Ran(stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def orchestrate_json(orchestrate: Callable[..., Ran]) -> Callable[..., Mapping[str, Any]]:
    """The JSON of a run that must succeed."""

    def run(*words: object) -> Mapping[str, Any]:
        ran = orchestrate(*words, "--json")
        assert ran.code == 0, ran.err
        document: Mapping[str, Any] = json.loads(ran.out)
        return document

    return run


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Runs without pictures, which are a quarter of the time of a short one: for tests that do not look at them."""
    from orchestrator.verbs.training import results

    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_png", "timeline_png"):
            patch.setattr(results, name, lambda *_, **__: b"")
        yield


@pytest.fixture(scope="session")
def timeline_of() -> Callable[..., Timeline]:
    """A timeline from values."""

    def make(
        origin: Origin,
        spans: Iterable[Span] = (),
        flows: Iterable[Flow] = (),
        counters: Iterable[Counter] = (),
        chips: Mapping[int, str] | None = None,
    ) -> Timeline:
        recorder = Recorder(origin, chips)
        for span in spans:
            recorder.span(*span)
        for flow in flows:
            recorder.flow(flow)
        for counter in counters:
            recorder.counter(counter)
        return recorder.timeline()

    return make


@pytest.fixture(scope="session")
def timed_anew() -> Callable[[Program, StepCosts], SimulatedStep]:
    """A simulated step of which no segment is recalled: each is timed again."""

    class Forgetful(dict[Any, Any]):
        def get(self, *_: object) -> None:
            """Nothing is ever found."""

    class Loop(simulated.StepLoop):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.timed = Forgetful()

    def time(program: Program, costs: StepCosts) -> SimulatedStep:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulated, "StepLoop", Loop)
            return simulated.simulate_step(program, costs)

    return time


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """What a command has put in place of a signal's effect goes with its test: a process is not one command here."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        if handler is not None and signal.getsignal(each) is not handler:
            signal.signal(each, handler)
