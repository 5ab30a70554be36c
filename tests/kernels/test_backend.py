"""Backend: a compiled segment gives the bytes of its operators one by one, and runs nothing but operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from comms.errors import SegmentError
from kernels.backend import OpCode, compile_segment, one_thread_per_chip, prepare_thread
from kernels.reference import interpret_segment
from orchestrator.runners.runner import StepRequest
from partitioner.program.program import Segment

OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt": (),
    "bf16": (("dtype", torch.bfloat16),),
    "llama": (("name", "hf:llama-tiny"),),
    "gpt2": (("name", "hf:gpt2-tiny"),),
}


def codes(segment: Segment) -> list[OpCode]:
    return [OpCode(op.code, len(op.outs), op.is_tuple) for op in segment.ops]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_segment_of_a_program_gives_the_bytes_of_its_operators(
    name: str,
    tp: int,
    tiny_program: Callable[..., Any],
    running_chips: Callable[..., Any],
    batches_of: Callable[..., Any],
) -> None:
    program = tiny_program(OPTIONS[name], tp=tp, pp=2, microbatches=2)
    chips, seen = running_chips(program, dict(OPTIONS[name])), set()

    def compare(chip: Any, ins: Any, microbatch: int, operands: Any, results: Any) -> None:
        segment = program.segments[ins.segment]
        expected = interpret_segment(codes(segment), segment.outputs, "cpu", operands)
        assert [r.dtype for r in results] == [e.dtype for e in expected]
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True)), segment.name
        seen.add(ins.segment)

    for chip in chips.chips.values():
        chip.observer = compare
    chips.run(StepRequest("step", 0.01, batches_of(program)))
    chips.run(StepRequest("evaluate", 0.0, batches_of(program)))
    started = {
        i.segment for r in program.roles if "constants" in r.body for i in r.body["constants"].instructions
    }
    assert seen | started == set(range(len(program.segments)))


def run(
    code: str | list[str], *inputs: torch.Tensor, num_outs: int = 1, is_tuple: bool = False, output: int = -1
) -> torch.Tensor:
    """The value of a list of operations, by the compiled function; the reference must agree."""
    lines = [code] if isinstance(code, str) else code
    ops = [OpCode(line, num_outs, is_tuple) for line in lines[:1]] + [
        OpCode(line, 1, False) for line in lines[1:]
    ]
    last = len(inputs) + len(ops) - 1 if output < 0 else output
    (found,) = compile_segment("test", len(inputs), ops, [last], "cpu")(*inputs)
    (expected,) = interpret_segment(ops, [last], "cpu", inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    return found


A = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("aten.add.Tensor(v0, v0, alpha=0.5)", A * 1.5),
        ("aten.mul.Tensor(v0, -2)", A * -2),
        ("aten.transpose.int(v0, 0, 1)", A.t()),
        ("aten.view.default(v0, [-1])", A.flatten()),
        ("aten.view.default(v0, [])", None),
        ("aten._to_copy.default(v0, dtype=dtype.f64)", A.double()),
        ("aten.cat.default([v0, v0], 1)", torch.cat([A, A], 1)),
        ("aten.full.default([2, 2], inf, dtype=dtype.f32, device=device)", torch.full((2, 2), float("inf"))),
        ("aten.full.default([2], -inf, device=device)", torch.full((2,), float("-inf"))),
        ("aten.full.default([2], nan, device=device)", torch.full((2,), float("nan"))),
        ("aten.mul.Tensor(v0, complex(0.0, -1.5))", A * -1.5j),
        ("aten.clone.default(v0, memory_format=torch.contiguous_format)", A),
        ("aten.sum.dim_IntList(v0, [0], True)", A.sum(0, True)),
        ("aten.index.Tensor(v0, [None, v1])", A[:, [2, 0]]),
        ("aten.zeros.default([], dtype=dtype.f64, device=device)", torch.zeros((), dtype=torch.float64)),
        ("aten.scalar_tensor.default(3, dtype=dtype.i64)", torch.tensor(3)),
        ("aten.where.ScalarOther(v2, v0, 0)", torch.where(A > 2, A, 0)),
    ],
)
def test_literals_of_the_op_language(code: str, expected: torch.Tensor | None) -> None:
    if expected is None:
        assert run(code, torch.ones(1)).shape == ()
        return
    found = run(code, A, torch.tensor([2, 0]), A > 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("code", "operand"),
    [("aten.mul.Tensor(v0, True)", [2.0, 3.0]), ("aten.add.Tensor(v0, True)", [True, False]),
     ("aten.mul.Tensor(v0, False)", [2, 3]), ("aten.scalar_tensor.default(True, dtype=dtype.f64)", [1.0])],
)  # fmt: skip
def test_truth_values_are_promoted_as_torch_does(code: str, operand: list[Any]) -> None:
    x, call = torch.tensor(operand), code.replace("v0", "x").replace("dtype.f64", "torch.float64")
    expected = eval(call.replace("aten.", "torch.ops.aten."), {"torch": torch, "x": x})
    found = run(code, x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_results_of_tuples_and_lists_are_taken_out_by_number() -> None:
    norm = "aten.native_layer_norm.default(v0, [3], None, None, 1e-05)"
    mean = run([norm, "getitem(v1, 1)"], A, num_outs=3, is_tuple=True)
    assert torch.equal(mean, A.mean(1, keepdim=True))
    third = run(["aten.split.Tensor(v0, 1, 1)", "getitem(v1, 2)"], A, num_outs=3, is_tuple=True)
    assert torch.equal(third, A[:, 2:])


def test_shard_slice_takes_the_part_of_its_coordinate() -> None:
    for coordinate in range(3):
        found = run("orchestrate.shard_slice.default(v0, 1, v1, 3)", A, torch.tensor(coordinate))
        assert torch.equal(found, A[:, coordinate : coordinate + 1])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("aten.mm.default(v0,", "malformed"),
        ("v0", "malformed"),
        ("", "malformed"),
        ("aten.no_such_op.default(v0)", "unknown operator"),
        ("aten.mm.no_such_overload(v0, v0)", "unknown operator"),
        ("nowhere.mm.default(v0, v0)", "unknown operator"),
        ("aten.mm.default(v0)", "missing"),
        ("aten.mul.Tensor(v0, len)", "not a literal"),
        ("aten.mul.Tensor(v0, open('/etc/passwd').read())", "not a literal"),
        ("aten.mul.Tensor(v0, __import__('os').getpid())", "not a literal"),
        ("aten.mul.Tensor(v0, (lambda: 1)())", "not a literal"),
        ("exec('import os')", "not an operator"),
        ("eval(v0)", "not an operator"),
        ("print(v0)", "not an operator"),
    ],
)
def test_what_is_no_operator_on_values_and_literals_is_refused(code: str, said: str) -> None:
    with pytest.raises(SegmentError, match=said):
        compile_segment("test", 1, [OpCode(code, 1, False)], [1], "cpu")


@pytest.mark.parametrize(
    "code", ["__import__('os').system('true')", "(lambda x: x)(v0)", "mm(v0, v0)", "aten.mm(v0, v0)"]
)
def test_calls_of_anything_else_are_refused_too(code: str) -> None:
    with pytest.raises(SegmentError):
        compile_segment("test", 1, [OpCode(code, 1, False)], [1], "cpu")


def test_threads_and_gradients_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with one_thread_per_chip():
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        prepare_thread()
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


def test_an_input_may_be_an_output() -> None:
    (found,) = compile_segment("odd name, with/signs", 1, [], [0], "cpu")(A)
    assert torch.equal(found, A)
