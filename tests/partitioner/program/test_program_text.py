"""The text form reads back to the same Program and says which line is wrong."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ProgramError
from partitioner.program.program import (
    Body,
    Call,
    Collective,
    CollectiveOp,
    Group,
    Operation,
    Reduction,
    Role,
    Segment,
    Send,
    Tensor,
    TensorKind,
    Wait,
)
from partitioner.program.program_text import from_text, instruction_text, to_text

NAMES = st.text(max_size=8)


@given(data=st.data())
def test_any_program_reads_back_equal(programs, data):
    program = data.draw(programs)
    assert from_text(to_text(program)) == program


@given(data=st.data(), names=st.lists(NAMES, min_size=5, max_size=5))
def test_odd_names_specs_and_facts_read_back(toy, specs, data, names):
    op = Operation(
        "aten.foo.default(v0, ' : f32[2] flops=1', [1.5e-05, -inf])",
        (),
        data.draw(st.booleans()),
        2**70,
        0,
        1,
    )
    spec = data.draw(specs)
    pair = Operation("aten.bar.default(v0)", (spec, spec), True, 0, 0, 0)
    segment = Segment(7, names[0], (spec,), (op, pair), (0,))
    tensor = Tensor(3, names[1], TensorKind.CONSTANT, spec, ((0, "dp"), (1, "tp")), 1, 5, names[2])
    odd = Collective(4, CollectiveOp.ALL_GATHER, Reduction.NONE, Group(("pp",), (0, 7)), 1, (), (3,))
    body = Body(names[3], (odd, Wait(9, ()), replace(odd, group=Group(()), reduction=Reduction.MAX)))
    calls = (("a b", (Call(names[3], 2), Call(names[4], 0))), ("", ()))
    facts = ((names[4], data.draw(st.one_of(st.integers(), NAMES, st.floats(allow_nan=False)))),)
    role = Role(5, (tensor,), (body,), calls)
    program = replace(toy(1, 1), segments=(segment,), roles=(role,), meta=facts)
    assert from_text(to_text(program)) == program


def test_instructions_read_like_sentences():
    reduce = Collective(3, CollectiveOp.ALL_REDUCE, Reduction.SUM, Group(("tp",)), 0, (7,), (9,))
    assert instruction_text(reduce) == "all_reduce sum tp t7 -> t9"
    assert instruction_text(Send(1, 4, 1)) == "send t4 to 1"


def test_long_schedules_are_wrapped(toy):
    text = to_text(toy(2, 90))
    assert max(map(len, text.splitlines())) <= 120
    assert from_text(text) == toy(2, 90)


def test_comments_and_blank_lines_are_skipped(text_of, toy):
    text = text_of(2, 1).replace("microbatches", "# a remark\n\nmicrobatches")
    assert from_text(text) == toy(2, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("program v1", "program v99", "version 1"),
        ("axes pp=2", "axes pp=two", "whole number"),
        ("f32[4,4]", "f99[4,4]", "dtypes"),
        ("v3 = aten", "v9 = aten", "expected 'v3"),
        ("flops=64", "flops=many", "flops="),
        ("send t9 to 1", "send t9 at 1", "expected 't4 to 1'"),
        ("send t9 to 1", "throw t9 to 1", "unknown instruction 'throw'"),
        ("compute s0 t6 t1 -> t7 t8", "compute s0 t6 t1", "t1 t2 -> t3"),
        ("compute s0", "compute 0", "expected s<number>"),
        ("all_reduce sum tp t8 -> t9", "all_reduce", "needs its group"),
        ("grad=t2", "gradient=t2", "expected 'update"),
        ("t2 = grad", "t2 = grand", "unknown kind 'grand'"),
        ("base=t0", "bass=t0", "a tensor is"),
        ("forward(1)", "forward[1]", "schedule"),
    ],
)
def test_malformed_text_names_its_line(text_of, old, new, said):
    good = text_of(2, 2)
    bad = good.replace(old, new, 1)
    line = next(
        n for n, (a, b) in enumerate(zip(good.split("\n"), bad.split("\n"), strict=True), 1) if a != b
    )
    with pytest.raises(ProgramError, match=f"line {line}: ") as caught:
        from_text(bad)
    assert said in str(caught.value)


@given(data=st.data())
def test_damaged_text_is_refused_or_read_never_a_crash(text_of, data):
    text = text_of(2, 1)
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(1, 40))
    damaged = text[:start] + data.draw(st.text(max_size=5)) + text[start + length :]
    with suppress(ProgramError):
        from_text(damaged)
