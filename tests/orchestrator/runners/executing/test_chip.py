"""Chips: worker threads share compiled segments; a checkpoint holds enough to go on bit for bit, each thing once."""

import gc
import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from comms.errors import RunError
from orchestrator.runners.executing.chip import SegmentLibrary, saved_state
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.whole_state import whole_parameters
from orchestrator.runners.runner import StepRequest


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


def test_what_is_held_is_counted_while_other_threads_bring_more(
    running_chips: Callable[..., ChipSet], program: Any, threads_take_turns: None
) -> None:
    chip, ended = running_chips(program).chips[0], threading.Event()

    def bring() -> None:
        for number in itertools.cycle(range(1000)):
            chip.instances[0, number] = torch.zeros(1)
            if number == 999:
                chip.instances.clear()
            if ended.is_set():
                return

    bringing = threading.Thread(target=bring)
    bringing.start()
    try:
        assert all(chip._held_bytes() > 0 for _ in range(300))
    finally:
        ended.set()
        bringing.join()


Make = Callable[..., Any]
CASES = [
    ((), {"dp": 2}),
    ((), {"dp": 2, "zero": 1}),
    ((), {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "microbatches": 2}),
    ((("dtype", torch.bfloat16),), {"dp": 2, "zero": 1}),
    ((("tied", True),), {"pp": 2, "dp": 2, "microbatches": 2}),
]
each_case = pytest.mark.parametrize(("options", "degrees"), CASES, ids=str)


def states_of(chips: ChipSet) -> dict[int, dict[str, torch.Tensor]]:
    return {i: {k: v.clone() for k, v in saved_state(c).items()} for i, c in chips.chips.items()}


def step(chips: ChipSet, batches_of: Make, number: int) -> float:
    outcome = chips.run(StepRequest("step", 0.01, batches_of(chips.program, number)))
    assert outcome.stats is not None
    return outcome.stats.loss


@each_case
def test_training_goes_on_bit_for_bit_from_what_was_saved(
    options: Any, degrees: Any, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(options, **degrees)
    first = running_chips(program, dict(options))
    for number in range(2):
        step(first, batches_of, number)
    saved = states_of(first)
    second = running_chips(program, dict(options))
    second.restore(saved)
    assert [step(first, batches_of, n) for n in (2, 3)] == [step(second, batches_of, n) for n in (2, 3)]
    one, other = states_of(first), states_of(second)
    assert all(one[i].keys() == other[i].keys() for i in one)
    assert all(torch.equal(one[i][k], other[i][k]) for i in one for k in one[i])


@each_case
def test_every_replica_but_the_first_saves_only_what_is_its_own(
    options: Any, degrees: Any, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(options, **degrees)
    chips = running_chips(program, dict(options))
    step(chips, batches_of, 0)
    states = states_of(chips)
    for index, state in states.items():
        is_first = program.coordinates(index)["dp"] == 0
        assert any(name.endswith(".params") for name in state) == is_first
        assert any(".optimizer." in name for name in state) == (is_first or bool(program.facts["zero"]))
    moments = sum(v.numel() for s in states.values() for k, v in s.items() if k.endswith("exp_avg"))
    copies = program.size("tp") if program.size("tp") == 1 else None
    if copies and not program.facts["zero"] and not dict(options).get("tied"):
        assert moments == program.facts["params"]


@pytest.mark.parametrize("name", ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"])
@pytest.mark.parametrize(
    "degrees", [{}, {"tp": 2}, {"pp": 2, "dp": 2, "microbatches": 2, "zero": 1}], ids=str
)
def test_parameters_are_whole_again_by_name_and_shape(
    name: str, degrees: Any, tiny_program: Make, tiny_model: Make, running_chips: Make
) -> None:
    options = {"name": name}
    chips = running_chips(tiny_program(tuple(options.items()), **degrees), options)
    found = whole_parameters(chips.program, states_of(chips).__getitem__)
    expected = dict(tiny_model("cpu", **options).module.named_parameters())
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].reshape(value.shape), value)


@pytest.mark.parametrize(
    "error",
    [ValueError("no such row"), KeyError("row"), SystemExit(3), RuntimeError("no such row")],
    ids=repr,
)
def test_an_operator_that_ends_with_anything_is_named_with_its_chip(
    program: Any, running_chips: Callable[..., Any], batches_of: Callable[..., Any], error: BaseException
) -> None:
    """The error is one that passes between processes as it is: inline and actors say the same, with one exit code."""

    def raising(*_: torch.Tensor) -> None:
        raise error

    chips = running_chips(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentLibrary, "function", lambda *_: raising)
        with pytest.raises(RunError, match=r"failed: ") as caught:
            chips.run(StepRequest("step", 0.01, batches_of(program)))
    assert "on chip 0 (stage 0), microbatch 0" in caught.value.where
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.exit_code == 1
