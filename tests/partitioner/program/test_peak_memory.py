"""Peak memory equals a walk that keeps every tensor of every microbatch in one dictionary."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.program.peak_memory import MemoryClass, Output, footprint, peak_memory
from partitioner.program.program import (
    Call,
    Collective,
    Compute,
    Free,
    Operation,
    Recv,
    Role,
    Segment,
    Send,
    TensorSpec,
)

ROW, SQUARE = 32, 64  # bytes of f32[2,4] and f32[4,4]
PEAK_INSIDE = {0: 2 * ROW, 1: ROW + SQUARE + ROW, 2: ROW, 3: 24}  # by hand, from the toy's segments


def resident(role: Role) -> int:
    return sum(t.spec.nbytes for t in role.tensors if t.base is None and not t.is_per_microbatch)


def brute_force(role: Role, schedule: str) -> int:
    """The peak of a toy role, whose segments return no views of one another; sent bytes linger until the next call."""
    alive: dict[tuple[int, int], int] = {}
    lingering: Counter[str] = Counter()
    peak = base = resident(role)
    for call in role.schedule[schedule]:
        lingering[call.body] = 0
        sent = set()
        for ins in role.body[call.body].instructions:
            reads = (ins.tensor,) if isinstance(ins, Send) else getattr(ins, "reads", ())
            sent |= set(reads) if isinstance(ins, Send) else set()
            batch = [t for t in reads if role.tensors[t].kind == "batch"]
            for tensor in batch:
                alive[tensor, call.microbatch] = role.tensors[tensor].spec.nbytes
            now = base + sum(alive.values()) + lingering.total()
            if isinstance(ins, Compute):
                peak = max(peak, now + PEAK_INSIDE[ins.segment])
            made = ins.writes if isinstance(ins, Compute | Collective) else ()
            for tensor in (*made, *((ins.tensor,) if isinstance(ins, Recv) else ())):
                if role.tensors[tensor].is_per_microbatch:
                    alive[tensor, call.microbatch] = role.tensors[tensor].spec.nbytes
            peak = max(peak, base + sum(alive.values()) + lingering.total())
            for tensor in ins.tensors if isinstance(ins, Free) else ():
                nbytes = alive.pop((tensor, call.microbatch))
                lingering[call.body] += nbytes if tensor in sent else 0
    return peak


@given(data=st.data())
def test_peak_equals_brute_force(programs, data):
    program = data.draw(programs)
    schedule = data.draw(st.sampled_from(["step", "evaluate"]))
    found = peak_memory(program, schedule)
    for role, memory in zip(program.roles, found, strict=True):
        assert memory.peak_bytes == brute_force(role, schedule)


@given(data=st.data())
def test_classes_add_up_to_the_peak(programs, data):
    program = data.draw(programs)
    for role, memory in zip(program.roles, peak_memory(program), strict=True):
        assert sum(nbytes for _, nbytes in memory.classes) == memory.peak_bytes
        assert all(nbytes >= 0 for _, nbytes in memory.classes)
        assert resident(role) <= memory.peak_bytes


@pytest.mark.parametrize("pp", [4, 6])
def test_1f1b_holds_one_microbatch_less_per_later_stage(toy, pp):
    peaks = [dict(m.classes)[MemoryClass.ACTIVATIONS] for m in peak_memory(toy(pp, 9))]
    middle = peaks[1:-1]
    assert all(a - b == 2 * ROW for a, b in itertools.pairwise(middle))  # x and pre, kept for backward


def test_1f1b_does_not_grow_with_microbatches_and_gpipe_does(toy):
    def peaks(schedule: PipelineSchedule, microbatches: int) -> list[int]:
        return [m.peak_bytes for m in peak_memory(toy(3, microbatches, schedule=schedule))]

    assert peaks(PipelineSchedule.ONE_F_ONE_B, 8) == peaks(PipelineSchedule.ONE_F_ONE_B, 64)
    grown = [
        b - a for a, b in zip(peaks(PipelineSchedule.GPIPE, 8), peaks(PipelineSchedule.GPIPE, 9), strict=True)
    ]
    assert grown == [2 * ROW, 2 * ROW, 3 * ROW]  # the last stage keeps its output, too


def test_parameters_count_once_whatever_views_them(toy):
    (memory,) = peak_memory(toy(1, 1))
    persistent = {MemoryClass.PARAMS: SQUARE, MemoryClass.GRADS: SQUARE, MemoryClass.CONSTANTS: 2 * 24}
    assert {name: n for name, n in memory.classes if name in persistent} == persistent
    assert resident(toy(1, 1).roles[0]) == sum(persistent.values())


def test_the_peak_says_where_it_is(toy):
    (memory,) = peak_memory(toy(1, 2, schedule=PipelineSchedule.GPIPE))
    assert memory.call == Call("backward", 0)
    assert memory.where == f"stage 0: backward(0) instruction {memory.instruction}"


def test_without_calls_only_persistent_tensors_count(toy):
    (memory,) = peak_memory(toy(1, 1), "no such schedule")
    assert memory.peak_bytes == resident(toy(1, 1).roles[0])
    assert memory.where == "stage 0: throughout"


SPEC, BIG = TensorSpec((2,), "f32"), TensorSpec((10,), "f32")


def op(code: str, *outs: TensorSpec, view: bool = False, is_tuple: bool = False) -> Operation:
    return Operation(code, outs, is_tuple, 0, 0 if view else 8, 0 if view else sum(o.nbytes for o in outs))


def test_a_segment_frees_values_after_their_last_use():
    ops = (op("a.x(v0)", BIG), op("a.y(v1)", BIG), op("a.z(v2)", BIG))
    run = footprint(Segment(0, "s", (SPEC,), ops, (3,)))
    assert (run.peak_bytes, run.kept_at_peak) == (2 * BIG.nbytes, 0)
    assert run.outputs == (Output(3, BIG.nbytes),)


def test_a_view_keeps_what_it_views_alive():
    ops = (
        op("a.x(v0)", BIG),
        op("a.slice(v1, 'v0')", SPEC, view=True),
        op("a.y(v0)", BIG),
        op("a.z(v2, v3)", SPEC),
    )
    run = footprint(Segment(0, "s", (SPEC,), ops, (2, 4)))
    assert run.peak_bytes == 2 * BIG.nbytes + SPEC.nbytes
    assert run.outputs == (Output(1, BIG.nbytes), Output(3, SPEC.nbytes))


def test_a_view_of_an_input_is_free():
    run = footprint(Segment(0, "s", (BIG,), (op("a.t(v0)", BIG, view=True),), (1,)))
    assert (run.peak_bytes, run.outputs) == (0, (Output(0, 0),))


def test_elements_of_a_tuple_go_one_by_one():
    ops = (
        op("a.pair(v0)", BIG, SPEC, is_tuple=True),
        op("getitem(v1, 1)", SPEC, view=True),
        op("a.y(v2)", BIG),
        op("a.z(v3)", BIG),
    )
    run = footprint(Segment(0, "s", (SPEC,), ops, (4,)))
    assert run.peak_bytes == max(BIG.nbytes + SPEC.nbytes, SPEC.nbytes + 2 * BIG.nbytes - SPEC.nbytes)


def test_an_output_that_views_another_is_counted_once(toy):
    program = toy(1, 1)
    forward = program.segments[0]
    aliased = replace(
        forward, ops=(forward.ops[0], op("aten.view.default(v2)", TensorSpec((2, 4), "f32"), view=True))
    )
    (before,), (after,) = (
        peak_memory(program),
        peak_memory(replace(program, segments=(aliased, *program.segments[1:]))),
    )
    assert before.peak_bytes - after.peak_bytes == 0  # the peak is in backward, where part is gone
    (before,), (after,) = (
        peak_memory(p, "evaluate")
        for p in (program, replace(program, segments=(aliased, *program.segments[1:])))
    )
    assert before.peak_bytes - after.peak_bytes == ROW
