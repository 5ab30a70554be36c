"""distribute: the one line that moves a model.

    step = orchestrator.distribute(model, optimizer, cluster="cluster.yaml")
    loss = step(batch)

The model is captured at the first batch, split over the cluster's chips and trained there, in this process. Settings of
the optimizer's groups (learning rates, betas, decay) are read at every step, so schedulers keep working. `step.sync()`
copies trained parameters and optimizer states back. What changes between steps is seen: another kind of batch,
frozen or unfrozen parameters, new groups and `train()` or `eval()` lead to another Program; weights, buffers and states
that were changed are loaded, if they had been fetched before by `sync()`, and refused otherwise.
"""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from comms.errors import PlanError, RunError, located
from kernels.optimizers import Scope, entry_states, same_kind, scope_of, states_per_element
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.plan_choice import choose_plan
from orchestrator.planning.preparation import module_values
from orchestrator.runners.executing.chip import Settings
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.whole_state import (
    MASTER,
    chip_states,
    whole_buffers,
    whole_parameters,
    whole_states,
)
from orchestrator.runners.runner import StepRequest, num_workers
from orchestrator.runs.data import split_batch, step_key
from orchestrator.verbs.verification.sides import PlannedSide
from orchestrator.verbs.verification.step_check import STEPS, States, StepCheck
from orchestrator.verbs.verification.verdict import TrainingVerdict
from orchestrator.views.split_notes import warnings_of
from partitioner.capture.batch_inputs import Batch, settings_of, tensors_of
from partitioner.capture.captured_graph import Graph
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tracing import LossFunction
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.lowering.lower import capture_and_lower, step_shape
from partitioner.program.program import Program

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
Situation: TypeAlias = tuple[object, ...]  # what a Program is made for


class DistributedStep:
    """A training step on all chips of a plan; made by `distribute`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cluster: Cluster, plan: Plan | None,
        loss_fn: LossFunction | None, clip_norm: float | None, scope: Scope, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.cluster = model, optimizer, cluster
        self.plan, self.loss_fn, self.clip_norm, self.scope = plan, loss_fn, clip_norm, scope
        self.seed, self.steps = seed, 0
        self.program: Program | None = None
        self._runner: ChipSet | None = None
        self._situation: Situation = ()
        self._programs: dict[Situation, Program] = {}
        self._entries = entry_states(same_kind(optimizer))
        self._masters: dict[str, torch.Tensor] = {}  # full-precision copies of parameters that have less
        self._is_ahead = False  # the chips have trained since their values were last fetched
        self._seen: Mapping[str, object] = {}

    def __call__(self, batch: Batch) -> float:
        """One optimizer step on a whole global batch; returns its loss. Raises UserError."""
        runner, program = self._ready(batch)
        settings = tuple(_settings(group) for group in self.optimizer.param_groups)
        batches = split_batch(tensors_of(batch), program, step_key(self.seed, self.steps))
        stats = runner.run(StepRequest("step", batches=batches, settings=settings)).stats
        assert stats is not None
        if not stats.is_finite:
            problem = "the loss or a gradient is not finite; the step was skipped"
            raise RunError(
                problem, "step", "lower the learning rate, or look for a batch without valid targets"
            )
        self._is_ahead = True
        self.steps += 1
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for
        return stats.loss

    def evaluate(self, batch: Batch) -> float:
        """The loss of a batch, without training."""
        runner, program = self._ready(batch)
        batches = split_batch(tensors_of(batch), program, step_key(self.seed, self.steps))
        stats = runner.run(StepRequest("evaluate", batches=batches)).stats
        assert stats is not None
        return stats.loss

    def verify(self, batch: Batch) -> TrainingVerdict:
        """Whether training on this batch now is the same as in plain PyTorch on one chip; `str` of it says where not.

        Two steps from here are compared: losses, gradients, parameters and buffers, in float64 and in the model's
        dtype. Nothing is trained by it, except that `sync()` is called.
        """
        self._ready(batch)
        assert self.plan is not None
        self.sync()
        keys = tuple(step_key(self.seed, self.steps + k) for k in range(STEPS))
        settings = tuple(_settings(group) for group in self.optimizer.param_groups)
        check = StepCheck(
            self.model,
            self.optimizer,
            self.loss_fn,
            self.clip_norm,
            self._own_states(),
            keys,
            settings,
            self.plan.norm_parts,
        )
        found = check.verdict(batch, self._side)
        self._seen = self._values_seen()
        return found

    def _side(self, batch: Batch, states: States, exact: bool) -> PlannedSide:
        """All chips, given what the model holds now; `exact`: made anew, with float64 throughout."""
        assert self.plan is not None and self.program is not None
        program, ages = self.program, self._ages()
        if exact:
            key = ("exact", *self._situation, *ages.items())
            program = self._programs.get(key) or self._program(batch, self.plan, ages, exact=True)
            self._programs[key] = program
        return PlannedSide(program, self._loaded(program, states), module_values(self.model))

    def sync(self) -> nn.Module:
        """Copy trained parameters and optimizer states back into the model and the optimizer; returns the model."""
        if self._runner is not None and self.program is not None and self._is_ahead:
            states = self._runner.states()
            params = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, value in whole_parameters(self.program, states.__getitem__).items():
                    params[name].copy_(value.view(params[name].shape))
                for name, value in whole_buffers(self.program, states).items():
                    self.model.get_buffer(name).copy_(value)
            for name, own in whole_states(self.program, states).items():
                like = params[name]
                made = {
                    k: v.view(like.shape) if v.dim() and v.numel() == like.numel() else v
                    for k, v in own.items()
                }
                if MASTER in made:
                    self._masters[name] = made.pop(MASTER)
                self.optimizer.state[like] = made
            self._is_ahead, self._seen = False, self._values_seen()
        return self.model

    def _ready(self, batch: Batch) -> tuple[ChipSet, Program]:
        """The runner for this batch and what the model and the optimizer are now."""
        _require_batch(batch)
        situation = self._situation_of(batch)
        changed = [name for name, value in self._values_seen().items() if self._seen.get(name) != value]
        if self._runner is not None and changed and self._is_ahead:
            raise PlanError(f"{changed[0]} was changed between steps, but trained values were not fetched before",
                            "step(batch)", "call step.sync(), then change it")  # fmt: skip
        if self._runner is None or situation != self._situation or changed:
            self.sync()
            self._start(batch, situation)
        assert self._runner is not None and self.program is not None
        return self._runner, self.program

    def _situation_of(self, batch: Batch) -> Situation:
        """All that a Program depends on besides the code of the model."""
        tensors = tuple((n, tuple(v.shape), v.dtype) for n, v in tensors_of(batch).items())
        modes = tuple(module.training for module in self.model.modules())
        trained = tuple(p.requires_grad for p in self.model.parameters())
        groups = tuple(tuple(id(p) for p in group["params"]) for group in self.optimizer.param_groups)
        return tensors, settings_of(batch), modes, trained, groups

    def _values_seen(self) -> dict[str, object]:
        """Marks of all values that live on the chips: they differ once something else writes to them."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        seen: dict[str, object] = {name: (id(v), v.data_ptr(), v._version, _checksum(v)) for name, v in named}
        for name, param in self.model.named_parameters():
            own = self.optimizer.state.get(param, {})
            marks = tuple(
                (k, id(v), v._version if isinstance(v, torch.Tensor) else v) for k, v in own.items()
            )
            seen[f"the optimizer's state of {name}"] = marks
        return seen

    def _start(self, batch: Batch, situation: Situation) -> None:
        self.plan = self.plan or self._chosen_plan(batch)
        if self.plan.num_chips != self.cluster.num_chips:
            raise PlanError(f"the plan is for {self.plan.num_chips} chips, the cluster has {self.cluster.num_chips}",
                            "plan", f"take chips={self.plan.num_chips}, or change a degree")  # fmt: skip
        ages = self._ages()
        key = (*situation, tuple(ages.items()))
        if key not in self._programs:
            self._programs[key] = self._program(batch, self.plan, ages)
        program = self._programs[key]
        runner = self._loaded(program, self._own_states())
        self.program, self._runner, self._situation = program, runner, situation
        self._is_ahead, self._seen = False, self._values_seen()

    def _loaded(self, program: Program, states: States) -> ChipSet:
        """The plan's chips, with what the model holds and these states of the optimizer."""
        settings = Settings(same_kind(self.optimizer), self.clip_norm, groups=())
        runner = ChipSet(program, settings, num_workers(self.cluster))
        values = module_values(self.model)
        runner.load(values.__getitem__)
        if states:
            runner.restore(chip_states(program, values.__getitem__, states, self._entries))
        return runner

    def _own_states(self) -> dict[str, dict[str, Any]]:
        """The optimizer's states by parameter, and full-precision copies."""
        values = module_values(self.model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        own: dict[str, Any] = {
            names[id(p)]: state for p, state in self.optimizer.state.items() if id(p) in names
        }
        for name, master in self._masters.items():  # unless the parameter was changed since
            if torch.equal(master.to(values[f"params:{name}"].dtype), values[f"params:{name}"]):
                own[name] = {**own.get(name, {}), MASTER: master}
        return own

    def _chosen_plan(self, batch: Batch) -> Plan:
        """A plan for all chips; samples are units of work, as nothing is known of tokens."""
        lengths = Counter(v.shape[0] for v in tensors_of(batch).values() if v.dim())
        samples = max(lengths, key=lambda n: (lengths[n], n), default=1)
        job = load_job(None).model_copy(update={"global_batch": max(samples, 1), "seq": 1})
        return choose_plan(job, self.cluster, sum(p.numel() for p in self.model.parameters()))

    def _ages(self) -> dict[str, tuple[tuple[str, float], ...]]:
        """How far each parameter's state has come: only parameters of one age can share a step."""
        ages = {}
        for name, param in self.model.named_parameters():
            own = self.optimizer.state.get(param, {})
            counts = {k: float(v) for k, v in own.items() if not isinstance(v, torch.Tensor) or v.dim() == 0}
            ages[name] = (*sorted(counts.items()), ("states", float(len(own))))
        return ages

    def _program(
        self, batch: Batch, plan: Plan, ages: Mapping[str, object], *, exact: bool = False
    ) -> Program:
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = {
            names[id(p)]: (index, ages[names[id(p)]])
            for index, group in enumerate(self.optimizer.param_groups) for p in group["params"] if id(p) in names
        }  # fmt: skip
        apart = frozenset(names.values()) - set(groups)
        free = [n for n, p in self.model.named_parameters() if n in apart and p.requires_grad]
        if free and self.clip_norm is not None:
            problem = f"{free[0]} has a gradient but is in no group of the optimizer: clip it with the others or not?"
            raise PlanError(problem, "clip_norm", "freeze it (requires_grad_(False)), or add it to a group")
        shape = replace(
            step_shape(self.model, batch, states_per_element(same_kind(self.optimizer))),
            groups=groups, whole_tensors=self.scope is Scope.PARAMETER,
        )  # fmt: skip

        def graph(microbatches: int) -> Graph:
            return capture_graph(
                self.model, batch, dp=plan.dp, microbatches=microbatches, loss_fn=self.loss_fn, frozen=apart,
                min_units=plan.pp, exact=exact, norms_per_part=plan.batch_norm is BatchNorms.PER_PART,
            )  # fmt: skip

        program = capture_and_lower(graph, plan, shape)
        for said in warnings_of(program):
            warnings.warn(said, stacklevel=5)  # the line of step(batch)
        return program


def distribute(
    model: nn.Module, optimizer: torch.optim.Optimizer, cluster: str | Path | Cluster, *, plan: Plan | None = None,
    chips: int | None = None, loss_fn: LossFunction | None = None, clip_norm: float | None = None,
    seed: int = 0,
) -> DistributedStep:  # fmt: skip
    """Train `model` with `optimizer` on the chips of `cluster` (a file, a shipped name, or a Cluster).

    `model(**batch)` returns the loss, or `loss_fn(output, **batch)` (or `loss_fn(output, batch)`) does. Without a
    `plan` one is chosen at the first batch. Dropout and other random numbers follow from `seed`, the step
    (`step.steps`, to be set by whoever resumes) and the sample, not from torch's generators. Raises UserError.
    """
    kind = type(optimizer).__name__
    if clip_norm is not None and not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise PlanError(f"clip_norm is {clip_norm}", "distribute", "give a number above 0, or leave it out")
    if any(getattr(optimizer, name, None) for name in HOOKS):
        raise PlanError(
            "hooks of the optimizer's steps would not run", kind, "remove them, or call them yourself"
        )
    with located(kind, "use an optimizer that steps on given gradients"):
        scope = scope_of(same_kind(optimizer))
    found = cluster if isinstance(cluster, Cluster) else load_cluster(cluster_path(str(cluster)))
    return DistributedStep(model, optimizer, found.take(chips), plan, loss_fn, clip_norm, scope, seed)


def _require_batch(batch: object) -> None:
    if not isinstance(batch, Mapping) or not batch:
        problem = "the batch is not a mapping of names to inputs"
        raise PlanError(problem, "step(batch)", "pass {name: input}, as model(**batch)")
    if any(v.numel() == 0 and v.dim() and not v.shape[0] for v in tensors_of(batch).values()):
        raise PlanError("the batch has no samples", "step(batch)", "leave empty batches out")


def _checksum(value: torch.Tensor) -> tuple[float, float]:
    """Two sums that a write through `.data`, which no version counts, changes too."""
    flat = value.detach().reshape(-1).to(torch.float64)
    return float(flat.sum()), float(flat.abs().sum())


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, without its parameters."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
