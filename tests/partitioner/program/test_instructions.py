"""Instructions are declared once: text, packed form and effects follow from FORM and from what the fields hold."""

import re

import pytest

from partitioner.program.instructions import (
    FIELDS,
    INSTRUCTIONS,
    instruction_text,
    named,
    read_instruction,
    reads,
    writes,
)
from partitioner.program.program import (
    Accumulate,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Recv,
    Reduction,
    Send,
    Update,
    Wait,
)

GROUP = Group(("pp", "dp"), (0, 2))
# instruction, its text, what it reads and what it writes
KNOWN = [
    (Compute(7, 3, (1, 2), (4,)), "compute s3 t1 t2 -> t4", (1, 2), (4,)),
    (Compute(7, 3, (), ()), "compute s3 ->", (), ()),
    (Accumulate(7, (1, 2), (3, 4)), "accumulate t1 t2 -> t3 t4", (1, 2), (3, 4)),
    (
        Collective(7, CollectiveOp.REDUCE_SCATTER, Reduction.AVG, GROUP, 1, (1,), (2,)),
        "reduce_scatter avg pp*dp@0+2 t1 -> t2 dim=1", (1,), (2,),
    ),
    (
        Collective(7, CollectiveOp.ALL_GATHER, Reduction.NONE, Group(()), 0, (1,), (2,)),
        "all_gather - t1 -> t2", (1,), (2,),
    ),
    (Send(7, 1, 3), "send t1 to 3", (1,), ()),
    (Recv(7, 1, 3), "recv t1 from 3", (), (1,)),
    (Wait(7, (1, 2)), "wait t1 t2", (), ()),
    (Wait(7, ()), "wait", (), ()),
    (Free(7, (1, 2)), "free t1 t2", (), ()),
    (Update(7, 1, 2, 3, 4, True), "update t1 grad=t2 stats=t3 target=t4 decay", (1, 2, 3), (1, 4)),
    (Update(7, 1, 2, 3, 1, False), "update t1 grad=t2 stats=t3 target=t1 no_decay", (1, 2, 3), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "text", "read", "written"), KNOWN, ids=lambda value: str(value)[:30])
def test_an_instruction_reads_back_and_says_what_it_does(instruction, text, read, written):
    assert instruction_text(instruction) == text
    assert read_instruction(text.split(), "7") == instruction
    assert (reads(instruction), writes(instruction)) == (read, written)
    mentioned = instruction.tensors if isinstance(instruction, Wait | Free) else (*read, *written)
    assert named(instruction) == mentioned


def test_every_kind_is_tried_here():
    assert {type(instruction) for instruction, *_ in KNOWN} == set(INSTRUCTIONS)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_the_form_shows_every_field_once(kind):
    assert sorted(re.findall(r"{(\w+)}", kind.FORM)) == sorted(field.name for field in FIELDS[kind])


def test_places_in_the_packed_form_never_change():
    names = [kind.__name__ for kind in INSTRUCTIONS]
    assert names[:8] == ["Compute", "Accumulate", "Collective", "Send", "Recv", "Wait", "Free", "Update"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("throw t9 to 1", "unknown instruction 'throw'; known: compute, accumulate, send, recv, wait, free, update"),
        ("compute", "expected s<number>, found ''"),
        ("compute s1 t1", "expected 't1 t2 -> t3'"),
        ("compute s1 t1 -> t2 -> t3", "expected 't1 t2 -> t3'"),
        ("accumulate x -> t2", "expected t<number>, found 'x'"),
        ("send t1", "expected 't4 to 1', not 't1'"),
        ("recv t1 to 2", "expected 't4 from 1', not 't1 to 2'"),
        ("send t1 to x", "'x' is not a whole number"),
        ("wait t1 -> t2", "expected t<number>, found '->'"),
        ("all_reduce", "a collective needs its group, for example tp or pp*dp or pp@0+3"),
        ("all_reduce sum tp t1 -> t2 dim=x", "'x' is not a whole number"),
        ("all_reduce none tp t1 -> t2", "'p' is not a whole number"),
        ("update t1 grad=x stats=t3 target=t1 decay", "expected 'update t1 grad=t2 stats=t3 target=t1 decay' (or no_"),
        ("update t1 grad=t2", "expected 'update t1 grad=t2 stats=t3 target=t1 decay' (or no_decay)"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_said(text, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        read_instruction(text.split(), "0")
