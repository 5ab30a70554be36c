"""distribute: the one line that moves a model.

    step = orchestrator.distribute(model, optimizer, cluster="cluster.yaml")
    loss = step(batch)

The model is captured at the first batch, split over the cluster's chips and trained there, in this process. The
learning rate is read from the optimizer's first group at every step, so schedulers keep working; `step.sync()` copies
the trained parameters back into the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from comms.errors import PlanError, RunError, located
from comms.selection.progress import quiet
from kernels.optimizers import require_elementwise, states_per_element
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.plan_choice import choose_plan
from orchestrator.planning.preparation import make_program, module_values
from orchestrator.runners.executing.chip import Settings, whole_parameters
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.runner import StepRequest, num_workers
from orchestrator.runs.data import split_batch
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tracing import LossFunction
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import step_shape
from partitioner.program.program import Program


class DistributedStep:
    """A training step on all chips of a plan; made by `distribute`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cluster: Cluster, plan: Plan | None,
        loss_fn: LossFunction | None, clip_norm: float | None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.cluster = model, optimizer, cluster
        self.plan, self.loss_fn, self.clip_norm = plan, loss_fn, clip_norm
        self.program: Program | None = None
        self._runner: ChipSet | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> float:
        """One optimizer step on a whole global batch; returns its mean loss. Raises UserError."""
        runner = self._ready(batch)
        assert self.plan is not None
        lr = float(self.optimizer.param_groups[0]["lr"])
        stats = runner.run(StepRequest("step", lr, split_batch(batch, self.plan))).stats
        assert stats is not None
        if not stats.is_finite:
            problem = "the loss or a gradient is not finite; the step was skipped"
            raise RunError(problem, "step", "lower the learning rate")
        return stats.loss

    def evaluate(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Mean loss of a batch of the same shape, without training."""
        runner = self._ready(batch)
        assert self.plan is not None
        stats = runner.run(StepRequest("evaluate", batches=split_batch(batch, self.plan))).stats
        assert stats is not None
        return stats.loss

    def sync(self) -> nn.Module:
        """Copy the trained parameters back into the model and return it."""
        if self._runner is not None and self.program is not None:
            states = self._runner.states()
            with torch.no_grad():
                trained = whole_parameters(self.program, states.__getitem__)
                for name, param in self.model.named_parameters():
                    if name in trained:
                        param.copy_(trained[name].view(param.shape))
        return self.model

    def _ready(self, batch: Mapping[str, torch.Tensor]) -> ChipSet:
        """The runner; a batch must look like the first one, whose counts are part of the Program."""
        if self._runner is None:
            return self._start(batch)
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        if shapes != self._shapes:
            raise PlanError(f"the batch has shapes {shapes}, the first had {self._shapes}", "step(batch)",
                            "keep batches of one size (drop or fill up the last)")  # fmt: skip
        return self._runner

    def _start(self, batch: Mapping[str, torch.Tensor]) -> ChipSet:
        samples = _num_samples(batch)
        num_params = sum(p.numel() for p in self.model.parameters())
        # A job that leaves its plan open; samples are units of work, as nothing is known of tokens.
        job = load_job(None).model_copy(update={"global_batch": samples, "seq": 1})
        plan = self.plan or choose_plan(job, self.cluster, num_params)
        if plan.num_chips != self.cluster.num_chips:
            raise PlanError(f"the plan is for {plan.num_chips} chips, the cluster has {self.cluster.num_chips}", "plan",
                            f"take chips={plan.num_chips}, or change a degree")  # fmt: skip
        if samples % (plan.dp * plan.microbatches):
            raise PlanError(f"a batch of {samples} does not split into dp {plan.dp} x {plan.microbatches} microbatches",
                            "batch", f"use a multiple of {plan.dp * plan.microbatches}")  # fmt: skip
        self.plan = plan
        self.program = self._program(batch, plan, samples)
        settings = Settings(_factory(self.optimizer), self.clip_norm)
        self._runner = ChipSet(self.program, settings, num_workers(self.cluster))
        self._runner.load(module_values(self.model).__getitem__)
        self._shapes = {name: tuple(value.shape) for name, value in batch.items()}
        return self._runner

    def _program(self, batch: Mapping[str, torch.Tensor], plan: Plan, samples: int) -> Program:
        size = samples // (plan.dp * plan.microbatches)
        example = {name: value[:size] for name, value in batch.items()}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        names = {name for name, p in self.model.named_parameters() if id(p) not in held}
        shape = replace(
            step_shape(self.model, batch, states_per_element(_factory(self.optimizer))),
            undecayed=_undecayed(self.model, self.optimizer),
        )
        graph = partial(
            capture_graph, self.model, example, size,
            loss_fn=self.loss_fn, frozen=frozenset(names), min_units=plan.pp,
        )  # fmt: skip
        return make_program(graph, plan, shape, quiet)


def distribute(
    model: nn.Module, optimizer: torch.optim.Optimizer, cluster: str | Path | Cluster, *, plan: Plan | None = None,
    chips: int | None = None, loss_fn: LossFunction | None = None, clip_norm: float | None = None,
) -> DistributedStep:  # fmt: skip
    """Train `model` with `optimizer`'s settings on the chips of `cluster` (a file, a shipped name, or a Cluster).

    `model(**batch)` returns the loss, or `loss_fn(output, **batch)` does. Without a `plan` one is chosen at the first
    batch. Raises UserError.
    """
    hint = "use an elementwise optimizer (AdamW, SGD, Lion, ...)"
    with located(type(optimizer).__name__, hint):
        require_elementwise(_factory(optimizer))
    if optimizer.state:
        raise PlanError("the optimizer has stepped before: its state would be lost", type(optimizer).__name__,
                        "give a new optimizer")  # fmt: skip
    found = cluster if isinstance(cluster, Cluster) else load_cluster(cluster_path(str(cluster)))
    return DistributedStep(model, optimizer, found.take(chips), plan, loss_fn, clip_norm)


def _num_samples(batch: object) -> int:
    if not isinstance(batch, Mapping) or not batch:
        problem = "the batch is not a mapping of tensors"
        raise PlanError(problem, "step(batch)", "pass {name: tensor}, as model(**batch)")
    sizes = {name: value.shape[0] for name, value in batch.items()}
    if len(set(sizes.values())) != 1:
        problem = f"batch entries differ in their first dim: {sizes}"
        raise PlanError(problem, "step(batch)", "make it the sample dim")
    return next(iter(sizes.values()))


def _factory(optimizer: torch.optim.Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer over other tensors."""
    kind, settings = type(optimizer), dict(optimizer.defaults)
    accepted = kind.__init__.__code__.co_varnames
    return lambda params: kind(params, **{k: v for k, v in settings.items() if k in accepted})


def _undecayed(model: nn.Module, optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Parameters in groups without weight decay; groups may differ in nothing else."""
    names = {id(p): name for name, p in model.named_parameters()}
    usual = optimizer.defaults.get("weight_decay", 0.0)
    lr, kind = optimizer.param_groups[0]["lr"], type(optimizer).__name__
    undecayed: set[str] = set()
    for group in optimizer.param_groups:
        settings = [k for k in group if k in optimizer.defaults and k not in ("lr", "weight_decay")]
        other = [k for k in settings if group[k] != optimizer.defaults[k]]
        decay = group.get("weight_decay", usual)
        if other or decay not in (0.0, usual) or group["lr"] != lr:
            problem = f"parameter groups differ in {', '.join(other) or 'lr or weight_decay'}"
            raise PlanError(problem, kind, "groups may only switch weight decay off")
        if decay == 0.0:
            undecayed |= {names[id(p)] for p in group["params"] if id(p) in names}
    return frozenset(undecayed)
