"""verify: every plan is the same training as one chip's, and what is not is found and named."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import PlanError
from orchestrator.runners.executing.chip import ExecutingChip
from orchestrator.verbs import verify as verb
from orchestrator.verbs.verify import RelativeErrors, compare, verify
from orchestrator.verbs.verify_runs import Trajectory, relative
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.program.program import Compute, Program, TensorKind

Make = Callable[..., Any]
DEGREES = [
    (dp, tp, pp, zero)
    for dp, tp, pp, zero in product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (0, 1))
    if 1 < dp * tp * pp <= 8 and (dp > 1 or not zero)
]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(verb, "STEPS", 3)


@pytest.mark.parametrize(("dp", "tp", "pp", "zero"), DEGREES)
def test_every_plan_is_equal_to_one_chip(
    dp: int, tp: int, pp: int, zero: int, tiny_job: Make, laptop: Any
) -> None:
    plan = Plan(dp=dp, tp=tp, pp=pp, zero=zero, microbatches=8 // dp if pp > 1 else 1)
    result = verify(laptop.take(plan.num_chips), tiny_job("dtype=fp64"), plan)
    assert result.equal and result.first_difference is None
    assert result.errors.worst < 1e-10
    assert len(result.parameter_bytes_per_chip) == pp


VARIANTS = [
    ("tied", ["model_args.tied=true"], Plan(pp=2, dp=2, zero=1, microbatches=2)),
    ("tied over tp", ["model_args.tied=true"], Plan(tp=2, pp=2, microbatches=2)),
    ("llama-like", ["model_args.norm=rms", "model_args.rotary=true", "model_args.activation=swiglu",
                    "model_args.kv_heads=2", "model_args.bias=false"], Plan(tp=2, dp=2)),
    ("gpipe", [], Plan(pp=2, microbatches=4, schedule=PipelineSchedule.GPIPE)),
    ("no clipping", ["clip_norm=null"], Plan(dp=2)),
    ("sgd", ["optimizer.name=sgd", "optimizer.momentum=0.9"], Plan(dp=2, zero=1)),
    ("small buckets", [], Plan(dp=2, zero=1, bucket_bytes=1)),
    ("uneven stages", [], Plan(pp=2, microbatches=2, stages=(1, 3))),
    ("odd vocabulary", ["model_args.vocab=63"], Plan(tp=2)),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "plan"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_every_kind_of_model_and_optimizer_is_equal(
    overrides: list[str], plan: Plan, tiny_job: Make, laptop: Any
) -> None:
    assert verify(laptop.take(plan.num_chips), tiny_job("dtype=fp64", *overrides), plan).equal


@pytest.mark.parametrize("name", ["hf:gpt2-tiny", "hf:llama-tiny"])
def test_hugging_face_models_are_equal_under_tp_and_pp(name: str, tiny_job: Make, laptop: Any) -> None:
    job = tiny_job("dtype=fp64").model_copy(update={"model": name, "model_args": {}})
    assert verify(laptop.take(4), job, Plan(tp=2, pp=2, microbatches=2)).equal


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_the_jobs_own_dtype_the_difference_is_reordering_noise(
    dtype: str, tiny_job: Make, laptop: Any
) -> None:
    result = verify(laptop.take(4), tiny_job(f"dtype={dtype}"), Plan(dp=2, tp=2))
    assert result.equal
    assert result.own is not None and result.noise is not None
    assert 0 < result.own.worst <= 10 * result.noise.worst
    own = {"loss_rel": result.own.loss, "grad_rel": result.own.grad, "param_rel": result.own.param}
    assert result.document()["own_dtype"] == own


def first_matmul(program: Program, body: str) -> Compute:
    """The first heavy instruction of the last stage's body."""
    found = (i for i in program.roles[-1].body[body].instructions if isinstance(i, Compute))
    return next(i for i in found if program.segments[i.segment].flops > 10**4)


@pytest.mark.parametrize("body", ["forward", "backward"])
def test_a_broken_kernel_is_named_by_its_first_instruction(
    body: str, tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, job = Plan(dp=2, pp=2, microbatches=2), tiny_job("dtype=fp64", "clip_norm=null")
    program = verb.prepare(laptop.take(4), job, plan).program
    wrong, original = first_matmul(program, body), ExecutingChip._compute

    class Sloppy:
        """Chip 3's library: one segment is off by a millionth."""

        def __init__(self, library: Any) -> None:
            self.library = library

        def function(self, index: int) -> Any:
            right = self.library.function(index)
            return lambda *inputs: tuple(
                v * (1 + 1e-6) if v.is_floating_point() else v for v in right(*inputs)
            )

    def compute(self: ExecutingChip, instruction: Compute, microbatch: int) -> None:
        right, is_wrong = self.library, self.index == 3 and instruction.id == wrong.id
        self.library = Sloppy(right) if is_wrong else right  # type: ignore[assignment]
        original(self, instruction, microbatch)
        self.library = right

    monkeypatch.setattr(ExecutingChip, "_compute", compute)
    result = verify(laptop.take(4), job, plan)
    name = re.escape(program.segments[wrong.segment].name)
    assert not result.equal and result.errors.worst > 1e-8
    assert result.first_difference is not None
    assert re.fullmatch(
        rf"chip 3, microbatch 0, instruction {wrong.id} \({name}\): off by 1\.0e-06", result.first_difference
    )


def test_gradients_of_a_wrong_scale_are_found_although_they_are_clipped(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ExecutingChip._accumulate

    def doubled(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        original(self, instruction, microbatch)
        for tensor in instruction.writes:
            if self.program.num_chips > 1 and self.tensors[tensor].kind is TensorKind.GRAD:
                self.fixed[tensor].mul_(2.0)

    monkeypatch.setattr(ExecutingChip, "_accumulate", doubled)
    job = tiny_job("dtype=fp64", "clip_norm=0.01")
    assert not verify(laptop.take(2), job, Plan(dp=2)).equal


def test_a_wrong_exchange_is_found_against_one_chip(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.runners.executing import pending_communications

    def forgetful(reduction: Any, parts: Any, out: Any) -> torch.Tensor:
        return parts[0].clone()

    monkeypatch.setattr(pending_communications, "combine", forgetful)
    result = verify(laptop.take(2), tiny_job("dtype=fp64"), Plan(tp=2))
    assert not result.equal
    assert result.first_difference is not None and "(embed)" in result.first_difference


def test_a_wrong_update_is_said_to_be_no_forward_or_backward_instruction(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ExecutingChip._update

    def twice(self: ExecutingChip, instruction: Any) -> None:
        original(self, instruction)
        if len(self.coordinates) and self.program.num_chips > 1:
            self.fixed[instruction.param].mul_(1.001)

    monkeypatch.setattr(ExecutingChip, "_update", twice)
    result = verify(laptop.take(2), tiny_job("dtype=fp64"), Plan(dp=2))
    assert not result.equal
    assert result.errors.grad < 1e-10 < result.errors.param
    assert result.first_difference == "no forward or backward instruction; look at reductions and the update"


def test_a_plan_that_only_replicates_is_refused(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.planning import preparation

    original = preparation.build_model
    whole = {"*": "replicate", "blocks.*.attention.*": "replicate", "blocks.*.mlp.*": "replicate"}
    monkeypatch.setattr(
        preparation, "build_model", lambda job, device: replace(original(job, device), tp_plan=whole)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PlanError, match="tp 2 cuts nothing"):
        verify(
            laptop.take(2), tiny_job("dtype=fp64", "model_args.vocab=63", "model_args.max_seq=17"), Plan(tp=2)
        )


def test_the_result_says_what_each_chip_holds_and_does(tiny_job: Make, laptop: Any) -> None:
    document = verify(laptop.take(4), tiny_job("dtype=fp64"), Plan(tp=4)).document()
    (held,), whole = document["parameter_bytes_per_chip"], document["one_chip_parameter_bytes"]
    (work,), alone = document["flops_per_chip"], document["one_chip_flops"]
    assert 0.25 * whole < held < 0.35 * whole
    assert 0.25 * alone < work < 0.45 * alone
    assert document["equal"] and document["own_dtype"] is None


def trajectory(loss: float, value: float, name: str = "w") -> Trajectory:
    return Trajectory((loss,), {name: torch.full((4,), value)}, {name: torch.full((4,), value)})


def test_differences_are_relative_and_missing_tensors_infinite() -> None:
    assert compare(trajectory(2.0, 1.0), trajectory(2.0, 1.0), 1e-6) == RelativeErrors(0.0, 0.0, 0.0)
    assert compare(trajectory(2.2, 1.1), trajectory(2.0, 1.0), 1e-6).loss == pytest.approx(0.1)
    assert compare(trajectory(2.0, 1.1), trajectory(2.0, 1.0), 1e-6).grad == pytest.approx(0.1, rel=1e-5)
    assert compare(trajectory(2.0, 1.0, "w"), trajectory(2.0, 1.0, "b"), 1e-6).worst == float("inf")


@pytest.mark.parametrize(
    ("value", "expected", "error"),
    [
        (torch.ones(2), torch.ones(3), float("inf")),
        (torch.tensor([float("nan")]), torch.ones(1), float("inf")),
        (torch.tensor([1]), torch.tensor([2]), float("inf")),
        (torch.tensor([2]), torch.tensor([2]), 0.0),
        (torch.full((1,), 1e-9), torch.zeros(1), 1e-3),
    ],
)
def test_relative_distance(value: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert relative(value, expected, 1e-6) == pytest.approx(error)


def test_gradients_are_whole_on_the_planned_side(tiny_job: Make, laptop: Any) -> None:
    from orchestrator.planning.preparation import module_values
    from orchestrator.runners.executing.whole_state import whole_tensors
    from orchestrator.verbs.verify_runs import loaded_runner

    job = tiny_job("dtype=fp64")
    prepared = verb.prepare(laptop.take(4), job, Plan(dp=2, tp=2, zero=1))
    model = verb.build_model(job, "cpu")
    runner = loaded_runner(prepared, module_values(model.module))
    found = whole_tensors(prepared.program, TensorKind.PARAM, runner.buffer)
    for name, param in model.module.named_parameters():
        assert torch.equal(found[name].reshape(param.shape), param)
