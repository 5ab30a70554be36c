"""Pieces: forward and backward of a unit as runnable segments cut at collectives, equal to eager autograd."""

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.backend import OpCode
from kernels.reference import interpret_segment
from partitioner.capture.captured_graph import TORCH
from partitioner.layout.joint_trace import trace_joint
from partitioner.layout.param_cuts import param_cuts
from partitioner.lowering.pieces import CollectivePiece, SegmentPiece, TracedUnit, split_joint

EMBED, BLOCK, HEAD = 0, 1, 3


def split_unit(graph: Any, index: int, tp: int = 1) -> TracedUnit:
    unit = graph.units[index]
    template = graph.templates[unit.template]
    cuts = param_cuts(graph, tp) if tp > 1 else dict.fromkeys(unit.params)
    return split_joint(trace_joint(template, [cuts[name] for name in unit.params], tp))


def run(pieces: tuple[Any, ...], values: dict[int, torch.Tensor]) -> None:
    for piece in pieces:
        assert isinstance(piece, SegmentPiece)
        ops = [OpCode(op.code, len(op.outs), op.is_tuple) for op in piece.ops]
        results = interpret_segment(ops, piece.outputs, "cpu", [values[s] for s in piece.reads])
        values.update(zip(piece.writes, results, strict=True))


def random_inputs(template: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for spec in template.inputs:
        is_float = TORCH[spec.dtype].is_floating_point
        made.append(torch.randn(spec.shape, generator=generator, dtype=TORCH[spec.dtype]) if is_float
                    else torch.randint(0, 64, spec.shape, generator=generator))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def graph(tiny_graph: Callable[..., Any]) -> Any:
    return tiny_graph(dtype=torch.float64)


@pytest.mark.parametrize("index", [EMBED, BLOCK, HEAD])
def test_forward_and_backward_equal_eager_autograd(graph: Any, index: int) -> None:
    template = graph.templates[graph.units[index].template]
    unit, inputs = split_unit(graph, index), random_inputs(template)
    values = dict(enumerate(inputs))
    run(unit.forward, values)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    expected = template.graph(*leaves)
    seeds = [torch.randn_like(expected[i]) for i in unit.tangents]
    for slot, value in zip(unit.outputs, expected, strict=True):
        torch.testing.assert_close(values[slot], value.detach())
    values |= dict(enumerate(seeds, unit.coordinate + 1))
    run(unit.backward, values)
    torch.autograd.backward([expected[i] for i in unit.tangents], seeds)
    for source, slot in unit.grads:
        assert slot is not None
        torch.testing.assert_close(values[slot], leaves[source].grad)


def pieces_of(unit: TracedUnit) -> list[SegmentPiece]:
    return [p for p in (*unit.forward, *unit.backward) if isinstance(p, SegmentPiece)]


@pytest.mark.parametrize(
    ("index", "tp"), [(EMBED, 1), (BLOCK, 1), (HEAD, 1), (EMBED, 2), (BLOCK, 2), (HEAD, 2)]
)
def test_specs_of_slots_and_segments_agree(graph: Any, index: int, tp: int) -> None:
    unit = split_unit(graph, index, tp)
    for piece in pieces_of(unit):
        made = [*((s,) for s in piece.inputs), *(op.outs for op in piece.ops)]
        assert tuple(unit.specs[s] for s in piece.reads) == piece.inputs
        assert [(unit.specs[s],) for s in piece.writes] == [made[v] for v in piece.outputs]


@pytest.mark.parametrize("index", [EMBED, BLOCK, HEAD])
def test_with_one_chip_there_is_one_segment_each_way(graph: Any, index: int) -> None:
    unit = split_unit(graph, index)
    assert len(unit.forward) == len(unit.backward) == 1


def test_with_two_chips_segments_and_collectives_alternate(graph: Any) -> None:
    unit = split_unit(graph, BLOCK, 2)
    kinds = [CollectivePiece, SegmentPiece]
    for way in (unit.forward, unit.backward):
        assert [type(p) for p in way] == [kinds[(i + 1) % 2] for i in range(5)]


@pytest.mark.parametrize("tp", [1, 2])
def test_every_slot_is_written_before_it_is_read(graph: Any, tp: int) -> None:
    for index in (EMBED, BLOCK, HEAD):
        unit = split_unit(graph, index, tp)
        first_tangent = unit.coordinate + 1
        known = set(range(first_tangent))
        for way, more in (
            (unit.forward, ()),
            (unit.backward, range(first_tangent, first_tangent + len(unit.tangents))),
        ):
            known |= set(more)
            for piece in way:
                assert set(piece.reads) <= known
                known |= set(piece.writes)
        assert {s for _, s in unit.grads if s is not None} <= known


def test_no_tuple_and_no_idle_operation_crosses_into_the_code(graph: Any) -> None:
    for piece in pieces_of(split_unit(graph, BLOCK, 2)):
        assert not any(op.target in ("aten.detach.default", "aten.alias.default") for op in piece.ops)
        tuples = {len(piece.inputs) + i for i, op in enumerate(piece.ops) if op.is_tuple}
        assert not tuples & set(piece.outputs)


def test_code_holds_nothing_but_calls_of_literals(graph: Any) -> None:
    for piece in pieces_of(split_unit(graph, HEAD, 2)):
        for op in piece.ops:
            names = {n.id for n in ast.walk(ast.parse(op.code)) if isinstance(n, ast.Name)}
            assert all(
                n in ("aten", "getitem", "device", "dtype", "inf", "torch") or n[1:].isdigit() for n in names
            )


def test_views_are_made_again_in_backward_instead_of_being_saved(graph: Any) -> None:
    unit = split_unit(graph, BLOCK)
    forward, backward = unit.forward[0], unit.backward[0]
    assert isinstance(forward, SegmentPiece) and isinstance(backward, SegmentPiece)
    views = {"aten.t.default", "aten.view.default", "aten.transpose.int", "aten.permute.default"}
    makers = dict(enumerate(forward.ops, len(forward.inputs)))
    saved = [makers[v].target for v in forward.outputs if v in makers]
    assert saved and not views & set(saved)
