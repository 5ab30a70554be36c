"""Pending communications: collectives against brute force, combined in chip order, in float32 for half precision."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.optimizers import OptimizerSpec
from orchestrator.runners.executing.chip import ExecutingChip, SegmentLibrary
from orchestrator.runners.executing.pending_communications import PendingCommunications, combine
from orchestrator.runners.runner import Settings
from partitioner.program.machine import Key, Post
from partitioner.program.program import (
    Body,
    Collective,
    CollectiveOp,
    Group,
    Program,
    Recv,
    Reduction,
    Role,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64}
SETTINGS = Settings(OptimizerSpec(), None)


def chips_with(read: Tensor, write: Tensor, dp: int, pp: int = 1) -> dict[int, ExecutingChip]:
    roles = tuple(Role(stage, (read, write), (Body("b", ()),), ()) for stage in range(pp))
    program = Program((("pp", pp), ("dp", dp), ("tp", 1)), 1, (), roles)
    library = SegmentLibrary(program, "cpu")
    return {i: ExecutingChip(program, i, library, SETTINGS) for i in range(program.num_chips)}


def tensor(
    number: int, shape: tuple[int, ...], dtype: str, kind: TensorKind = TensorKind.ACTIVATION
) -> Tensor:
    return Tensor(number, f"t{number}", kind, TensorSpec(shape, dtype))


def meet(
    op: CollectiveOp, reduction: Reduction, parts: list[torch.Tensor], dtype: str, shape: tuple[int, ...],
    kind: TensorKind = TensorKind.ACTIVATION, order: list[int] | None = None, in_place: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """What every chip has afterwards; `order` is the order in which chips post."""
    size = len(parts)
    chips = chips_with(tensor(0, tuple(parts[0].shape), dtype), tensor(1, shape, dtype, kind), size)
    communications = PendingCommunications(chips, (0,) * size, 0)
    target = 0 if in_place else 1
    instruction = Collective(5, op, reduction, Group(("dp",)), 0, (0,), (target,))
    post = Post(0, 0, instruction, Key("group", tuple(range(size)), 0))
    for position, chip in enumerate(order or range(size)):
        chips[chip].write(0, 0, parts[chip].clone())
        assert communications.post(chip, post) == (position == size - 1)
    assert sorted(communications.carry_out(post.key)) == list(range(size))
    assert not communications.open
    return [chips[i].read(target, 0) for i in range(size)]


@st.composite
def contributions(draw: st.DrawFn) -> tuple[list[torch.Tensor], str, list[int]]:
    size, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parts = [
        (100 * torch.randn(rows * size, columns, generator=generator)).to(DTYPES[dtype]) for _ in range(size)
    ]
    return parts, dtype, draw(st.permutations(range(size)))


def in_chip_order(reduction: Reduction, parts: list[torch.Tensor]) -> torch.Tensor:
    """Brute force: from the first chip to the last, one at a time."""
    wide = [p.float() if p.dtype is torch.bfloat16 else p for p in parts]
    total = wide[0]
    for part in wide[1:]:
        total = (
            total + part
            if reduction is Reduction.SUM
            else (torch.maximum if reduction is Reduction.MAX else torch.minimum)(total, part)
        )
    return total.to(parts[0].dtype)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(f.dtype == e.dtype and torch.equal(f, e) for f, e in zip(found, expected, strict=True))


REDUCTIONS = st.sampled_from([Reduction.SUM, Reduction.MAX, Reduction.MIN])


@given(contributions(), REDUCTIONS, st.booleans())
def test_all_reduce_adds_in_chip_order_whoever_comes_first(
    case: Any, reduction: Reduction, in_place: bool
) -> None:
    parts, dtype, order = case
    found = meet(
        CollectiveOp.ALL_REDUCE,
        reduction,
        parts,
        dtype,
        tuple(parts[0].shape),
        order=order,
        in_place=in_place,
    )
    assert equal(found, [in_chip_order(reduction, parts)] * len(parts))


@given(contributions(), REDUCTIONS)
def test_reduce_scatter_gives_every_chip_its_part_of_the_all_reduce(case: Any, reduction: Reduction) -> None:
    parts, dtype, order = case
    size, (rows, columns) = len(parts), parts[0].shape
    found = meet(CollectiveOp.REDUCE_SCATTER, reduction, parts, dtype, (rows // size, columns), order=order)
    assert equal(found, list(in_chip_order(reduction, parts).chunk(size)))


@given(contributions(), st.sampled_from([TensorKind.ACTIVATION, TensorKind.FLAT]))
def test_all_gather_lines_up_the_parts(case: Any, kind: TensorKind) -> None:
    parts, dtype, order = case
    rows, columns = parts[0].shape
    found = meet(
        CollectiveOp.ALL_GATHER, Reduction.NONE, parts, dtype, (rows * len(parts), columns), kind, order
    )
    assert equal(found, [torch.cat(parts)] * len(parts))


@given(contributions())
def test_all_to_all_is_a_transpose_of_chunks(case: Any) -> None:
    parts, dtype, order = case
    size = len(parts)
    found = meet(CollectiveOp.ALL_TO_ALL, Reduction.NONE, parts, dtype, tuple(parts[0].shape), order=order)
    assert equal(found, [torch.cat([p.chunk(size)[i] for p in parts]) for i in range(size)])


@given(contributions())
def test_broadcast_gives_everyone_the_first_chips_tensor(case: Any) -> None:
    parts, dtype, order = case
    found = meet(CollectiveOp.BROADCAST, Reduction.NONE, parts, dtype, tuple(parts[0].shape), order=order)
    assert equal(found, [parts[0]] * len(parts))


def test_half_precision_is_accumulated_in_float32() -> None:
    parts = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([1.0], dtype=torch.bfloat16)] * 4
    assert combine(Reduction.SUM, parts, None).item() == 260.0  # one by one in bfloat16 it would stay 256
    assert combine(Reduction.SUM, parts, None).dtype is torch.bfloat16


def test_contributions_are_left_alone_unless_asked_for_in_place() -> None:
    parts = [torch.ones(2), torch.ones(2)]
    assert torch.equal(combine(Reduction.SUM, parts, None), torch.full((2,), 2.0))
    assert torch.equal(parts[0], torch.ones(2))
    assert combine(Reduction.SUM, parts, parts[0]) is parts[0]


@pytest.mark.parametrize("first", ["send", "recv"])
def test_a_send_meets_its_receive_whoever_posts_first(first: str) -> None:
    chips = chips_with(tensor(0, (2,), "f32"), tensor(1, (2,), "f32"), 1, pp=2)
    communications, key = PendingCommunications(chips, (0, 0), 0), Key("p2p", (0, 1), 0)
    value = torch.tensor([1.0, 2.0])
    chips[0].write(0, 3, value)
    posts = {"send": (0, Post(0, 3, Send(1, 0, 1), key)), "recv": (1, Post(0, 3, Recv(2, 1, 0), key))}
    second = {"send": "recv", "recv": "send"}[first]
    assert not communications.post(*posts[first])
    assert communications.post(*posts[second])
    assert sorted(communications.carry_out(key)) == [0, 1]
    assert torch.equal(chips[1].read(1, 3), value)


def test_what_was_sent_is_what_was_there_when_it_was_posted() -> None:
    chips = chips_with(tensor(0, (2,), "f32"), tensor(1, (2,), "f32"), 1, pp=2)
    communications, key = PendingCommunications(chips, (0, 0), 0), Key("p2p", (0, 1), 0)
    chips[0].write(0, 0, torch.ones(2))
    communications.post(0, Post(0, 0, Send(1, 0, 1), key))
    chips[0].instances.clear()  # freed by the sender's stream
    communications.post(1, Post(0, 0, Recv(2, 1, 0), key))
    communications.carry_out(key)
    assert torch.equal(chips[1].read(1, 0), torch.ones(2))


@given(
    contributions(),
    st.sampled_from([CollectiveOp.ALL_REDUCE, CollectiveOp.REDUCE_SCATTER, CollectiveOp.ALL_TO_ALL]),
)
def test_two_actors_get_the_bytes_of_one(case: Any, op: CollectiveOp) -> None:
    parts, dtype, _ = case
    size, (rows, columns) = len(parts), parts[0].shape
    if size == 1:
        return
    reduction = Reduction.NONE if op is CollectiveOp.ALL_TO_ALL else Reduction.SUM
    shape = (rows // size, columns) if op is CollectiveOp.REDUCE_SCATTER else (rows, columns)
    expected = meet(op, reduction, parts, dtype, shape)
    chips = chips_with(tensor(0, (rows, columns), dtype), tensor(1, shape, dtype), size)
    actor_of = tuple(chip % 2 for chip in range(size))
    halves = [
        PendingCommunications({c: chips[c] for c in range(size) if actor_of[c] == a}, actor_of, a)
        for a in (0, 1)
    ]
    instruction = Collective(5, op, reduction, Group(("dp",)), 0, (0,), (1,))
    post = Post(0, 0, instruction, Key("group", tuple(range(size)), 0))
    for chip in range(size):
        chips[chip].write(0, 0, parts[chip].clone())
        for actor, payload in halves[actor_of[chip]].outgoing(chip, post):
            halves[actor].deliver(post.key, chip, payload)
        halves[actor_of[chip]].post(chip, post)
    for half in halves:
        half.carry_out(post.key)
    assert equal([chips[i].read(1, 0) for i in range(size)], expected)
