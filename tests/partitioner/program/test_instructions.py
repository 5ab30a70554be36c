"""Instructions are declared once: text, packed form and effects follow from FORM and from what the fields hold."""

import re

import pytest

from partitioner.program.instructions import (
    FIELDS,
    INSTRUCTIONS,
    instruction_text,
    named,
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
    (Update(7, 1, 2, 3, 4, 0), "update t1 grad=t2 stats=t3 target=t4 group=0", (1, 2, 3), (1, 4)),
    (Update(7, 1, 2, 3, 1, 1), "update t1 grad=t2 stats=t3 target=t1 group=1", (1, 2, 3), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "text", "read", "written"), KNOWN, ids=lambda value: str(value)[:30])
def test_an_instruction_reads_back_and_says_what_it_does(read_instruction, instruction, text, read, written):
    assert instruction_text(instruction) == text
    assert read_instruction(7, *text.split()) == instruction
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
