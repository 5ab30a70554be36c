"""The text form leaves nothing out: it reads back to the same Program (the reader is in `conftest`)."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from partitioner.program.instructions import instruction_text
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
from partitioner.program.program_text import to_text

NAMES = st.text(max_size=8)


@given(data=st.data())
def test_any_program_reads_back_equal(programs, data, from_text):
    program = data.draw(programs)
    assert from_text(to_text(program)) == program


@given(data=st.data(), names=st.lists(NAMES, min_size=5, max_size=5))
def test_odd_names_specs_and_facts_read_back(toy, specs, data, names, from_text):
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


def test_long_schedules_are_wrapped(toy, from_text):
    text = to_text(toy(2, 90))
    assert max(map(len, text.splitlines())) <= 120
    assert from_text(text) == toy(2, 90)
