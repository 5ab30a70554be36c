"""The static check accepts good Programs and names chip and instruction of what is wrong with others."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comms.errors import ProgramError
from partitioner.program.program import VERSION, Accumulate, Collective, Program, Recv, Update
from partitioner.program.static_check import MOST_FINDINGS, check_program, require_valid

STEP_ONLY = (
    f"program v{VERSION}"
    """
axes pp=2 dp=1 tp=1
microbatches 1
segment s0 make
  v0 = aten.ones.default([2]) : f32[2] flops=0 read=0 written=8
  return v0
role 0
  t0 = activation mine : f32[2]
  t1 = activation theirs : f32[2]
  body step
    0 compute s0 -> t0
    1 {first0}
    2 {second0}
    3 {third0}
    4 free t0 t1
  schedule step: step(0)
role 1
  t0 = activation mine : f32[2]
  t1 = activation theirs : f32[2]
  body step
    0 compute s0 -> t0
    1 {first1}
    2 {second1}
    3 {third1}
    4 free t0 t1
  schedule step: step(0)
"""
)


def filled(text: str, *lines: str) -> str:
    names = ("first0", "second0", "third0", "first1", "second1", "third1")
    return text.format(**dict(zip(names, lines, strict=True)))


@pytest.fixture
def exchange(from_text: Callable[[str], Program]) -> Callable[..., Program]:
    """Two stages that run three instructions each between making a tensor and freeing it."""
    return lambda *lines: from_text(filled(STEP_ONLY, *lines))


def problems(program: Program) -> str:
    return "\n".join(map(str, check_program(program)))


@given(data=st.data())
def test_valid_programs_have_no_findings(programs, data):
    assert check_program(data.draw(programs)) == ()


@given(data=st.data())
@settings(max_examples=40)
def test_without_any_one_instruction_no_program_of_two_stages_is_valid(toy, data):
    program = toy(2, 2, 2, 2)
    role = data.draw(st.sampled_from(program.roles))
    body = data.draw(st.sampled_from(role.bodies))
    at = data.draw(st.integers(0, len(body.instructions) - 1))
    dropped = body.instructions[at]
    assume(not isinstance(dropped, Update | Accumulate))  # the toy would merely not learn
    assume(not isinstance(dropped, Collective) or dropped.reads != dropped.writes)
    kept = replace(body, instructions=body.instructions[:at] + body.instructions[at + 1 :])
    changed = replace(role, bodies=tuple(kept if b is body else b for b in role.bodies))
    roles = tuple(changed if r is role else r for r in program.roles)
    assert check_program(replace(program, roles=roles))


def test_the_mesh_size_does_not_matter_to_the_check(toy):
    big = replace(toy(4, 6, 2, 2), axes=(("pp", 4), ("dp", 2048), ("tp", 8)))
    assert check_program(big) == ()


def test_a_dropped_recv_is_named_on_both_sides(toy):
    program = toy(2, 2, 2, 2)
    role = program.roles[1]
    gone = tuple(
        replace(b, instructions=tuple(i for i in b.instructions if not isinstance(i, Recv)))
        for b in role.bodies
    )
    found = check_program(replace(program, roles=(program.roles[0], replace(role, bodies=gone))))
    assert any(f.where.startswith("chip 4 ") and "never written" in f.problem for f in found)
    sends = [f for f in found if f.where.startswith("chip 0 ")]
    assert sends
    assert "chip 4 (stage 1) never joins" in str(sends[0])
    assert "'send t9 to 1'" in str(sends[0])


def test_two_stages_that_both_receive_first_wait_in_a_circle(exchange):
    receives = ("recv t1 from 1", "wait t1", "send t0 to 1", "recv t1 from 0", "wait t1", "send t0 to 0")
    (finding,) = check_program(exchange(*receives))
    assert finding.where == "chip 0 (stage 0), step(0), instruction 2 'wait t1'"
    assert "wait cycle in schedule step" in finding.problem
    assert "chip 0 (stage 0), step(0), instruction 2 'wait t1' waits for chip 1" in finding.problem
    assert "chip 1 (stage 1), step(0), instruction 2 'wait t1' waits for chip 0" in finding.problem


def test_posting_both_before_waiting_is_no_circle(exchange):
    crossed = ("recv t1 from 1", "send t0 to 1", "wait t1", "recv t1 from 0", "send t0 to 0", "wait t1")
    assert check_program(exchange(*crossed)) == ()


def test_swapped_collectives_meet_the_wrong_partner(exchange):
    good = ("all_reduce sum pp t0 -> t1", "wait t1", "all_reduce max pp t0 -> t0")
    text = [*good[:2], "wait t0", *good[:2], "wait t0"]
    assert check_program(exchange(*text)) == ()
    swapped = (
        "all_reduce sum pp t0 -> t1",
        "wait t1",
        "wait t0",
        "all_reduce max pp t0 -> t1",
        "wait t1",
        "wait t0",
    )
    (finding,) = check_program(exchange(*swapped))
    assert finding.where.startswith("chip 1 (stage 1), step(0), instruction 1 ")
    assert "all_reduce max over pp" in finding.problem
    assert "all_reduce sum over pp" in finding.problem


def test_collectives_in_another_order_meet_the_wrong_partner(text_of, from_text):
    text = text_of(2, 1).replace(
        "update t0 grad", "all_reduce max pp t5 -> t5\n    97 wait t5\n    98 update t0 grad"
    )
    assert check_program(from_text(text)) == ()
    first, second = text.split("role 1")
    second = second.replace("all_reduce sum pp*dp*tp t4 -> t5", "all_reduce max pp t4 -> t5", 1)
    second = second.replace("all_reduce max pp t5 -> t5", "all_reduce sum pp*dp*tp t5 -> t5", 1)
    assert "all_reduce max over pp " in problems(from_text(first + "role 1" + second))


def test_unequal_shapes_of_a_transfer_are_named(from_text):
    lines = ("send t0 to 1", "wait t1", "wait t1", "recv t1 from 0", "wait t1", "wait t1")
    text = STEP_ONLY.replace("theirs : f32[2]", "theirs : f32[3]").replace("free t0 t1", "free t0", 1)
    (finding,) = check_program(from_text(filled(text, *lines)))
    assert finding.where.startswith("chip 1 (stage 1), step(0), instruction 1 ")
    assert "f32[3] meets f32[2]" in finding.problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("free t8", "free t8 t7", "reads t7, which is freed"),
        ("accumulate t12 -> t3", "free t12", "frees t12 again"),
        ("free t6 t7 t10", "free t6 t10", "t7 of microbatch 0 is not freed by the end of schedule step"),
    ],
)
def test_misused_tensors_are_named_with_chip_and_instruction(text_of, old, new, said, from_text):
    found = check_program(from_text(text_of(2, 2).replace(old, new, 1)))
    assert any(said in f.problem for f in found), found
    assert found[0].where.startswith("chip 0 (stage 0), backward(0), instruction ")


def test_reading_what_is_still_on_its_way_needs_a_wait(text_of, from_text):
    text = text_of(2, 1)
    line = next(line for line in text.split("\n") if line.endswith("wait t6"))
    found = check_program(from_text(text.replace(line + "\n", "")))
    assert found[0].where.startswith("chip 1 ")
    assert "reads t6 while t6 is on its way: a wait is missing" in found[0].problem


def test_writing_what_a_collective_still_reads_needs_a_wait(text_of, from_text):
    text = text_of(1, 2, 2).replace(
        "accumulate t12 -> t3", "all_reduce sum dp t2 -> t2\n    99 accumulate t12 -> t3"
    )
    assert "writes t3 while the transfer into t2 uses it: a wait is missing" in problems(from_text(text))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "t8 = activation part : f32[2,4]",
            "t8 = activation part : f32[2,5]",
            "its segment returns f32[2,4]",
        ),
        ("v5 = aten.t.default(v2)", "v5 = aten.t.default(v6)", "reads v6 before it is defined"),
        ("return v8 v6", "return v8 v9", "returns v9, which it does not define"),
        ("compute s0", "compute s9", "segment 9 does not exist"),
        ("free t8", "free t80", "t80 does not exist"),
        ("send t9 to 1", "send t9 to 2", "stage 2 is no other stage"),
        ("all_reduce sum tp t8 -> t9", "all_gather tp t8 -> t9", "t9 must be f32[4,4]"),
        ("all_reduce sum tp t8 -> t9", "reduce_scatter sum tp t8 -> t9", "t9 must be f32[1,4]"),
        ("all_reduce sum tp t8 -> t9", "reduce_scatter sum pp*tp*dp t8 -> t9", "cannot be cut into 8"),
        ("all_reduce sum tp t8 -> t9", "all_reduce sum ep t8 -> t9", "not made of axes"),
        ("all_reduce sum tp t8 -> t9", "all_reduce sum pp@1 t8 -> t9", "not a member"),
        ("accumulate t12 -> t3", "accumulate t11 -> t3", "its accumulator t3"),
        ("accumulate t12 -> t3", "accumulate t12 -> t3 t2", "1 terms for 2 accumulators"),
        ("stats=t5", "stats=t2", "not three numbers"),
        ("base=t0", "base=t0 offset=1", "does not lie within its buffer"),
        ("base=t0", "base=t99", "view of t99, which does not exist"),
        ("schedule step: ", "schedule step: nothing(0) ", "'nothing', a body that does not exist"),
        ("schedule step: ", "schedule step: forward(7) ", "for microbatch 7"),
        ("schedule evaluate", "schedule other", "different sets of schedules"),
        ("role 1", "role 2", "the roles are stages [0, 2]"),
        ("segment s2", "segment s5", "it is numbered 5"),
    ],
)
def test_broken_structure_is_named(text_of, old, new, said, from_text):
    found = check_program(from_text(text_of(2, 2, 2, 2).replace(old, new, 1)))
    assert any(said in str(f) for f in found), found


def test_findings_are_bounded(toy):
    role = toy(1, 1).roles[0]
    program = replace(toy(1, 1), roles=(replace(role, tensors=role.tensors[:1] * 200),))
    assert len(check_program(program)) == MOST_FINDINGS


def test_require_valid_raises_with_place(text_of, toy, from_text):
    require_valid(toy(2, 2))
    with pytest.raises(ProgramError, match="reads t7, which is freed") as caught:
        require_valid(from_text(text_of(2, 2).replace("free t8", "free t8 t7", 1)))
    assert caught.value.where.startswith("chip 0 (stage 0), backward(0), instruction")
