"""The msgpack form gives back the same Program, from the same bytes, or says why not."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import ProgramError
from partitioner.program.program import VERSION, Program
from partitioner.program.program_codec import decode, encode
from partitioner.program.program_text import to_text


@given(data=st.data())
def test_decode_is_the_inverse_of_encode(programs, data):
    program = data.draw(programs)
    assert decode(encode(program)) == program


@given(data=st.data())
@settings(max_examples=20)
def test_equal_programs_have_equal_bytes(programs, data, from_text):
    program = data.draw(programs)
    assert encode(from_text(to_text(program))) == encode(decode(encode(program))) == encode(program)


def test_gaps_in_ids_survive(toy):
    program = toy(2, 1)
    role = program.roles[0]
    body = replace(
        role.bodies[0], instructions=tuple(replace(i, id=3 * i.id + 2) for i in role.bodies[0].instructions)
    )
    moved = replace(
        program, roles=(replace(role, bodies=(body,), tensors=role.tensors[3:]), program.roles[1])
    )
    assert decode(encode(moved)) == moved


def test_facts_keep_type_and_size():
    facts = (("model_flops", 2**90), ("half", 0.5), ("one", 1.0), ("name", "x"))
    program = Program((("pp", 1),), 1, (), (), facts)
    decoded = decode(encode(program)).meta
    assert [(value, type(value)) for _, value in decoded] == [(value, type(value)) for _, value in facts]


def test_microbatches_cost_two_small_numbers_each(toy):
    few, many = len(encode(toy(2, 10))), len(encode(toy(2, 110)))
    assert many - few < 100 * 20 * 2


def test_chips_cost_nothing(toy):
    assert len(encode(toy(2, 4, 2, 2))) == len(
        encode(replace(toy(2, 4, 2, 2), axes=(("pp", 2), ("dp", 64), ("tp", 8))))
    )


def test_another_version_is_refused():
    with pytest.raises(ProgramError, match=f"version {VERSION + 1}, this is version {VERSION}"):
        decode(msgpack.packb(["program", VERSION + 1, "whatever"]))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"hello", msgpack.packb(["else", 1]), msgpack.packb(7)])
def test_other_bytes_are_not_a_program(data):
    with pytest.raises(ProgramError, match="not a Program"):
        decode(data)


def test_a_damaged_program_is_refused(toy):
    magic, version, tables, content = msgpack.unpackb(encode(toy(1, 1)))
    with pytest.raises(ProgramError, match="damaged"):
        decode(msgpack.packb([magic, version, tables[:2], content]))
    with pytest.raises(ProgramError, match="damaged"):
        decode(msgpack.packb([magic, version, tables, content[:-1]]))
