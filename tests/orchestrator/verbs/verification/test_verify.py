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
from orchestrator.planning.job_parts import job_parts
from orchestrator.runners.executing.chip import ExecutingChip
from orchestrator.verbs import verify as verb
from orchestrator.verbs.verification.job_sides import PlannedJob
from orchestrator.verbs.verification.job_steps import job_steps
from orchestrator.verbs.verify import verify
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.program.program import Compute, Program, TensorKind

Make = Callable[..., Any]
DROPPING = """
import torch
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().mean()
    def example_batch(self, batch, seq):
        return {"x": torch.randn(batch, 6)}
def model():
    return Net(nn.Linear(6, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 2))
"""
NORMED = """
import torch
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().mean()
    def example_batch(self, batch, seq):
        return {"x": torch.randn(batch, 6)}
def model():
    return Net(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 2))
"""
DEGREES = [
    (dp, tp, pp, zero)
    for dp, tp, pp, zero in product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (0, 1))
    if dp * tp * pp in (2, 8) and (dp > 1 or not zero)
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


def test_spans_of_sound_are_masked_alike_on_one_chip(tiny_job: Make, laptop: Any) -> None:
    args = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "layerdrop": 0,
        "conv_dim": [4, 4], "conv_stride": [16, 8], "conv_kernel": [16, 8], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 8,
    }  # fmt: skip
    job = tiny_job("dtype=fp64").model_copy(update={"model": "hf:wav2vec2:ctc", "model_args": args})
    assert verify(laptop.take(2), job, Plan(dp=2)).equal


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_the_jobs_own_dtype_the_difference_is_reordering_noise(
    dtype: str, tiny_job: Make, laptop: Any
) -> None:
    result = verify(laptop.take(4), tiny_job(f"dtype={dtype}"), Plan(dp=2, tp=2))
    assert result.equal
    assert result.own is not None and result.noise is not None
    assert 0 < result.own.worst <= 10 * result.noise.worst
    own = {
        "loss_rel": result.own.loss,
        "grad_rel": result.own.grad,
        "param_rel": result.own.param,
        "state_rel": result.own.state,
    }
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

    def twice(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        original(self, instruction, microbatch)
        if len(self.coordinates) and self.program.num_chips > 1:
            self.fixed[instruction.param].mul_(1.001)

    monkeypatch.setattr(ExecutingChip, "_update", twice)
    result = verify(laptop.take(2), tiny_job("dtype=fp64"), Plan(dp=2))
    assert not result.equal
    assert result.differs is not None and result.differs.startswith("step 1: embed.weight, ")
    assert result.first_difference == "no forward or backward instruction; look at reductions and the update"


def test_a_plan_that_only_replicates_is_refused(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.planning import job_parts

    original = job_parts.build_model
    whole = {"*": "replicate", "blocks.*.attention.*": "replicate", "blocks.*.mlp.*": "replicate"}
    monkeypatch.setattr(
        job_parts, "build_model", lambda job, device: replace(original(job, device), tp_plan=whole)
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


def test_gradients_are_whole_on_the_planned_side(tiny_job: Make, laptop: Any) -> None:
    from orchestrator.planning.preparation import module_values
    from orchestrator.runners.executing.whole_state import whole_tensors

    job = tiny_job("dtype=fp64")
    prepared = verb.prepare(laptop.take(4), job, Plan(dp=2, tp=2, zero=1))
    parts = job_parts(job, "cpu")
    values = {name: value.clone() for name, value in module_values(parts.model.module).items()}
    model, runner = parts.model, PlannedJob(prepared, parts, values).launch.chips
    found = whole_tensors(prepared.program, TensorKind.PARAM, runner.buffer)
    for name, param in model.module.named_parameters():
        assert torch.equal(found[name].reshape(param.shape), param)


def test_as_many_steps_are_compared_as_are_said(tiny_job: Make, orchestrate_json: Make) -> None:
    words = (
        "verify",
        "--cluster",
        "laptop",
        "--chips",
        2,
        "--model",
        "builtin:gpt-nano",
        "--global-batch",
        4,
    )
    few = ("--seq", 8, "--set", "plan.dp=2", "--set", "dtype=fp64")
    assert orchestrate_json(*words, *few, "--set", "steps=2")["steps"] == 2
    assert orchestrate_json(*words, *few)["steps"] == verb.STEPS


def test_a_job_of_fewer_steps_is_compared_to_its_end(tiny_job: Make, laptop: Any) -> None:
    job = tiny_job("dtype=fp64", "steps=2")
    assert verify(laptop.take(2), job, Plan(dp=2)).steps == 2
    assert verify(laptop.take(2), job, Plan(dp=2), steps=1).steps == 1


def test_batches_are_the_jobs_data_in_turn_with_irregular_ones(tiny_job: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"abc" * 400)
    job = tiny_job("model_args.vocab=256", f"data={text}")
    steps = job_steps(job_parts(job, "cpu"), 4)
    assert [set(step.batch["input_ids"].unique().tolist()) == set(b"abc") for step in steps] == [
        True,
        False,
    ] * 2
    ignored = [(step.batch["labels"] == -100).float().mean(1) for step in steps]
    assert ignored[0].max() == 0.0 < ignored[1].max() < 1.0
    assert ignored[3].tolist()[:4] == [1.0] * 4 and ignored[3].max() == 1.0 > ignored[3].min()
    assert len({step.key for step in steps}) == 4


def test_a_difference_of_a_later_step_is_found(
    tiny_job: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = ExecutingChip._update, list[int]()

    def late(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        original(self, instruction, microbatch)
        seen.append(self.index)
        if self.index == 1 and seen.count(1) == len(self.optimizers) + 1:  # the first of the second step
            self.value(instruction.param).mul_(1.001)

    monkeypatch.setattr(ExecutingChip, "_update", late)
    result = verify(laptop.take(2), tiny_job("dtype=fp64"), Plan(dp=2))
    assert (
        not result.equal
        and result.differs is not None
        and result.differs.startswith("step 2: embed.weight on chip 1, ")
    )


def test_dropout_is_equal_in_the_jobs_own_dtype(tmp_path: Path, laptop: Any, tiny_job: Make) -> None:
    (tmp_path / "dropping.py").write_text(DROPPING)
    job = tiny_job().model_copy(update={"model": f"{tmp_path}/dropping.py:model", "model_args": {}, "seq": 6})
    result = verify(laptop.take(4), job, Plan(dp=2, pp=2, microbatches=2))
    assert result.equal and result.noise is not None
    assert result.noise.grad < 1e-4, "masks are held while sums are re-ordered"


@pytest.mark.parametrize(("text", "graphs"), [(DROPPING, 1), (NORMED, 2)], ids=["each part alone", "mixed"])
def test_one_chip_takes_what_was_captured_for_a_plan_if_its_parts_are_the_same(
    text: str, graphs: int, tmp_path: Path, laptop: Any, tiny_job: Make
) -> None:
    (tmp_path / "net.py").write_text(text)
    job = tiny_job().model_copy(update={"model": f"{tmp_path}/net.py:model", "model_args": {}, "seq": 6})
    parts = job_parts(job, "cpu")
    prepared = verb.prepare(laptop.take(2), job, Plan(dp=2), parts=parts)
    alone = verb.on_one_chip(prepared, parts).program
    assert len(parts.graphs) == graphs
    assert alone == verb.on_one_chip(prepared, job_parts(job, "cpu")).program


def test_every_way_to_break_a_split_is_found(wrong: str, laptop: Any, tiny_job: Make) -> None:
    for dtype in ("fp64", "fp32"):
        result = verify(laptop.take(2), tiny_job(f"dtype={dtype}", "clip_norm=null"), Plan(dp=2))
        assert not result.equal and result.differs is not None and result.differs.startswith(wrong)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("norms", BatchNorms)
def test_batch_norm_is_held_against_one_chip_as_the_job_says(
    norms: BatchNorms,
    dtype: str,
    tmp_path: Path,
    laptop: Any,
    tiny_job: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    job = tiny_job(f"dtype={dtype}").model_copy(
        update={"model": f"{tmp_path}/normed.py:model", "model_args": {}, "seq": 6}
    )
    plan = Plan(dp=2, microbatches=2 if norms is BatchNorms.PER_PART else 1, batch_norm=norms)
    assert verify(laptop.take(2), job, plan).equal
    parts = 1 if norms is BatchNorms.PER_PART else 2
    monkeypatch.setattr(Plan, "norm_parts", parts)
    other = verify(laptop.take(2), job, plan)
    assert not other.equal, "the other way is another training run"
