"""distribute: the one line that moves a model.

    step = orchestrator.distribute(model, optimizer, cluster="cluster.yaml")
    loss = step(batch)

The model is captured at the first batch, split over the cluster's chips and trained there, in this process or by Ray
actors. Settings of the optimizer's groups are read at every step, so schedulers keep working. `step.sync()` copies
trained parameters and optimizer states back. What changes between steps is seen: another kind of batch, frozen or
unfrozen parameters, new groups, `train()` or `eval()`, hooks, and numbers that code reads (see `python_state`) lead to
another Program; changed weights, buffers and states are loaded if fetched before by `sync()`, and refused otherwise.
"""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from comms.errors import PlanError, RunError
from comms.selection.progress import Progress, quiet
from kernels.optimizers import as_kept, as_tensors, entry_states, group_settings, laid_as, same_kind
from kernels.trials.optimizer_trials import advance
from kernels.trials.setting_modes import modes_of
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.job_capture import ModuleCapture
from orchestrator.planning.job_parts import optimized_shape
from orchestrator.planning.optimizer_checks import checked_traits
from orchestrator.planning.preparation import module_values
from orchestrator.runners.executing import whole_state
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.own_operators import own_operators, require_no_state
from orchestrator.runners.runner import (
    HANG_TIMEOUT_S,
    ExecutedStep,
    Launch,
    Settings,
    StepRequest,
    TensorRunner,
    num_workers,
)
from orchestrator.runners.timing.fastest_plan import fastest_plan
from orchestrator.runs.checkpoints.checkpoint_folder import TrainingState
from orchestrator.runs.data import split_batch, step_key
from orchestrator.verbs.inputs.launch import launch_of
from orchestrator.verbs.state.empty_states import EmptyStates
from orchestrator.verbs.state.later_forwards import LaterForwards
from orchestrator.verbs.state.own_buffers import OwnBuffers
from orchestrator.verbs.state.python_state import PythonState
from orchestrator.verbs.training.situation import (
    Situation,
    ages_of,
    naming_the_call,
    require_batch,
    require_kinds,
    require_newest,
    set_newest,
    situation_of,
    ungiven,
)
from orchestrator.verbs.verification.one_chip import OneChip
from orchestrator.verbs.verification.sides import PlannedSide
from orchestrator.verbs.verification.step_check import STEPS, StepCheck
from orchestrator.verbs.verification.verdict import TrainingVerdict
from orchestrator.views.split_notes import warnings_of
from partitioner.capture.batch_inputs import Batch, tensors_of
from partitioner.capture.captured_graph import Graph
from partitioner.capture.forwards.step_loss import LossFunction
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.source_lines import depth_of_call
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.lowering.lower import StepShape, capture_and_lower
from partitioner.program.program import Program

MAX_PROGRAMS = 64  # a value that is annealed leads to another one at every step


class DistributedStep:
    """A training step on all chips of a plan; made by `distribute`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cluster: Cluster, plan: Plan | None,
        loss_fn: LossFunction | None, clip_norm: float | None, seed: int, launch: Launch, *, is_watched: bool = True,
        exact: bool = False, has_masters: bool = False, tp_plan: Mapping[str, str] | None = None,
        progress: Progress = quiet,
    ) -> None:  # fmt: skip
        """`is_watched`: others may write to these. `exact`, `tp_plan`: `capture_graph`; `has_masters`: `StepShape`."""
        self.model, self.optimizer, self.cluster = model, optimizer, cluster
        self.plan, self.loss_fn, self.clip_norm, self.tp_plan = plan, loss_fn, clip_norm, tp_plan
        self.traits, self._modes = checked_traits(optimizer), modes_of(optimizer)
        self.seed, self.steps, self.wait_s = seed, 0, HANG_TIMEOUT_S
        self.program: Program | None = None
        self.launch, self.is_watched, self.progress = launch, is_watched, progress
        self.exact, self.has_masters = exact, has_masters
        self._runner: TensorRunner | None = None
        self._situation: Situation = ()
        self._programs: dict[Situation, Program] = {}
        self._entries, self._empty = entry_states(same_kind(optimizer)), EmptyStates(optimizer)
        self._masters: dict[str, torch.Tensor] = {}  # full-precision copies of parameters that have less
        self._buffers = OwnBuffers(model)
        self._is_ahead = False  # the chips have trained since their values were last fetched
        self._seen: Mapping[str, object] = {}
        self._said: set[str] = set()  # what is not warned of again
        self._code, self._held = PythonState(), PythonState()
        self._later = LaterForwards(model, loss_fn, self._code)

    @naming_the_call()
    def __call__(self, batch: Batch) -> float:
        """One optimizer step on a whole global batch; returns its loss. Raises UserError."""
        stats = self.execute(batch).stats
        assert stats is not None
        if not stats.is_finite:
            hint = "look for entries that are not finite or no valid targets, or lower the learning rate"
            raise RunError("the loss or a gradient is not finite; the step was skipped", "step", hint)
        return stats.loss

    @naming_the_call()
    def evaluate(self, batch: Batch) -> float:
        """The loss of a batch, without training; the model's `train()` or `eval()` says how."""
        stats = self.execute(batch, "evaluate").stats
        assert stats is not None
        return stats.loss

    def execute(
        self, batch: Batch, schedule: str = "step", *, measure: bool = False, check: bool = False
    ) -> ExecutedStep:
        """Carry out a schedule on a whole global batch; a step that is not finite has changed nothing."""
        with torch.inference_mode(mode=False):  # others may evaluate in it; what is kept is written to later
            runner, program = self.ready(batch)
            settings = group_settings(self.optimizer)
            batches = split_batch(tensors_of(batch), program, step_key(self.seed, self.steps))
            request = StepRequest(schedule, 0.0, batches, measure=measure, check=check, settings=settings)
            result = runner.run(request)
            if self.is_watched:
                require_no_state(self._operators, lambda: self._situation_of(batch) == self._situation)
        if schedule == "step" and result.stats is not None and result.stats.is_finite:
            self._set_ahead(is_ahead=True)
            self.steps += 1
            if self.traits.moves_groups:
                advance(self.optimizer)
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for
        return result

    def adopt(self, program: Program, batch: Batch) -> None:
        """Take a Program that was made before for batches like this one, and start it."""
        situation = self._situation_of(batch)
        self._programs[*situation, ages_of(self.model, self.optimizer, self._entries)] = program
        self._said |= set(warnings_of(program))
        self._start(batch, situation)

    def training_state(self) -> TrainingState:
        """What a checkpoint holds, for any plan; a batch has been seen."""
        assert self._runner is not None and self.program is not None
        return whole_state.completed(whole_state.trained(self.program, self._runner.states()), self.model)

    def restore(self, held: TrainingState, steps: int, batch: Batch) -> None:
        """Go on from what `training_state` gave, under whichever plan, by a Program for batches like this one."""
        assert self.program is not None
        self._put(held)
        self.steps, ages = steps, ages_of(self.model, self.optimizer, self._entries)
        if whole_state.shared_steps(self.program, dict(ages)):
            self.adopt(self.program, batch)
        else:  # what has not come equally far is not stepped on together
            self._start(batch, self._situation_of(batch))
        self._set_ahead(is_ahead=True)

    def close(self) -> None:
        """Give back processes and memory; nothing is run after that."""
        set_newest(self, self.model.parameters(), is_newest=False)
        self.launch.close()

    @naming_the_call()
    def verify(self, batch: Batch) -> TrainingVerdict:
        """Whether training on this batch now is the same as in plain PyTorch on one chip; `str` of it says where not.

        Two steps from here are compared: losses, gradients, parameters and buffers, in float64 and in the model's
        dtype, with the plan's chips in this process whatever the runner. Nothing is trained by it, except that `sync()`
        is called.
        """
        return self.check(batch, STEPS).verdict(batch, self.side)

    def check(self, batch: Batch, num_steps: int) -> StepCheck:
        """A comparison of the steps to come, all on this batch, with one chip's; calls `sync()`."""
        self.ready(batch)
        assert self.plan is not None
        module = self.sync()
        keys = tuple(step_key(self.seed, self.steps + k) for k in range(num_steps))
        parts, masters = self.plan.norm_parts, self.has_masters
        chip = OneChip(module, self.optimizer, self.loss_fn, self.clip_norm, parts, masters)
        return StepCheck(chip, module_values(module), self.own_states(), keys, group_settings(self.optimizer))

    def side(self, batch: Batch, states: whole_state.OwnState, exact: bool) -> PlannedSide:
        """All chips in this process, given what the model holds now; `exact`: made anew, with float64 throughout."""
        assert self.plan is not None and self.program is not None
        program, ages = self.program, ages_of(self.model, self.optimizer, self._entries)
        if exact:
            key = ("exact", *self._situation, ages)
            program = self._programs.get(key) or self.program_by(batch, self.plan, exact=True)
            self._programs[key] = program
        chips = ChipSet(program, self._settings(), num_workers(self.cluster))
        self._fill(chips, program, states)
        return PlannedSide(program, chips, module_values(self.model))

    def sync(self) -> nn.Module:
        """Copy trained parameters and optimizer states back into the model and the optimizer; returns the model."""
        if self._runner is not None and self.program is not None and self._is_ahead:
            self._put(whole_state.trained(self.program, self._runner.states()))
            self._set_ahead(is_ahead=False)
            self._seen = self._values_seen()
        return self.model

    def _put(self, held: TrainingState) -> None:
        """Give the model and the optimizer what was trained."""
        params = dict(self.model.named_parameters())
        whole_state.require_there(held, params)
        with torch.no_grad():
            for name, value in held.parameters.items():
                params[name].copy_(value.view(params[name].shape))
            self._buffers.put(held.buffers)
        for name, own in held.states.items():
            if whole_state.MASTER in own:
                self._masters[name] = own[whole_state.MASTER]
            laid = {k: laid_as(v, params[name]) for k, v in own.items() if k != whole_state.MASTER}
            self.optimizer.state[params[name]] = as_kept(laid)

    def _set_ahead(self, *, is_ahead: bool) -> None:
        if is_ahead is not self._is_ahead:
            set_newest(self, self.model.parameters(), is_newest=is_ahead)
            self._empty.set(self.model, is_held=is_ahead)
        self._is_ahead = is_ahead

    def ready(self, batch: Batch) -> tuple[TensorRunner, Program]:
        """The runner for this batch and what the model and the optimizer are now."""
        require_batch(batch)
        require_newest(self, self.model.parameters())
        situation = self._situation_of(batch)
        changed = [name for name, value in self._values_seen().items() if self._seen.get(name) != value]
        changed += [f"the optimizer's state of {name}" for name in self._empty.lost()]
        if self._runner is not None and changed and self._is_ahead:
            raise PlanError(f"{changed[0]} was changed between steps, but trained values were not fetched before",
                            "step(batch)", "in a loop of your own (distribute), call step.sync() before")  # fmt: skip
        if self._runner is None or situation != self._situation or changed:
            self.sync()
            if not self._is_same(batch, situation) or changed:
                self._start(batch, situation)
        assert self._runner is not None and self.program is not None
        if self.is_watched:
            self._later.require_same(self.program, situation, batch)
        return self._runner, self.program

    def _is_same(self, batch: Batch, situation: Situation) -> bool:
        """Whether the Program that runs serves another situation too, as where `eval()` changes nothing."""
        if self._runner is None or self.plan is None:
            return False
        if self._program_of(batch, self.plan, situation) != self.program:
            return False
        self._situation = situation
        return True

    def _situation_of(self, batch: Batch) -> Situation:
        """All that a Program depends on besides values."""
        code = self._code.marks(self.model, self.loss_fn) if self.is_watched else ()
        found = situation_of(self.model, self.optimizer, batch)
        if (modes := modes_of(self.optimizer)) != self._modes:
            self.traits, self._modes = checked_traits(self.optimizer), modes
        return *found, code, self.traits.scope

    def _values_seen(self) -> dict[str, object]:
        """Marks of all values that live on the chips: they differ once something else writes to them."""
        return self._held.values(self.model, self.optimizer) if self.is_watched else {}

    def _start(self, batch: Batch, situation: Situation) -> None:
        """Run the Program for a situation, from what the model and the optimizer hold."""
        self.traits = checked_traits(self.optimizer)  # it may have been given hooks or attributes
        self.plan = self.plan or self._chosen_plan(batch)
        if self.plan.num_chips != self.cluster.num_chips:
            raise PlanError(f"the plan is for {self.plan.num_chips} chips, the cluster has {self.cluster.num_chips}",
                            "plan", f"take chips={self.plan.num_chips}, or change a degree")  # fmt: skip
        program = self._program_of(batch, self.plan, situation)
        runner = self.launch.connect(program, self._settings(), self.progress)
        self._fill(runner, program, self.own_states())
        self.program, self._runner, self._situation = program, runner, situation
        self._operators = own_operators(program)
        self._set_ahead(is_ahead=False)
        self._seen = self._values_seen()

    def _settings(self) -> Settings:
        return Settings(same_kind(self.optimizer), self.clip_norm, groups=(), hang_timeout_s=self.wait_s)

    def _fill(self, runner: TensorRunner, program: Program, states: whole_state.OwnState) -> None:
        """Give the chips what the model holds, and these states of the optimizer."""
        values = module_values(self.model)
        runner.load(values.__getitem__)
        if states:
            runner.restore(whole_state.chip_states(program, values.__getitem__, states, self._entries))

    def own_states(self) -> dict[str, dict[str, Any]]:
        """The optimizer's states by parameter, and full-precision copies."""
        values = module_values(self.model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        own: dict[str, Any] = {
            names[id(p)]: as_tensors(own) for p, own in self.optimizer.state.items() if id(p) in names
        }
        for name, master in self._masters.items():  # unless the parameter was changed since
            if torch.equal(master.to(values[f"params:{name}"].dtype), values[f"params:{name}"]):
                own[name] = {**own.get(name, {}), whole_state.MASTER: master}
        return own

    def _chosen_plan(self, batch: Batch) -> Plan:
        """A plan that splits the model over all chips; samples are units of work, as nothing is known of tokens."""
        lengths = Counter(v.shape[0] for v in tensors_of(batch).values() if v.dim())
        samples = max(lengths, key=lambda n: (lengths[n], n), default=1)
        job = load_job(None).model_copy(update={"global_batch": max(samples, 1), "seq": 1})
        shape, apart = self._shape(batch, dict(ages_of(self.model, self.optimizer, self._entries)))

        graph = partial(self._graph, batch, apart=apart, exact=self.exact)
        return fastest_plan(self.cluster, ModuleCapture(job, shape, graph, self.progress))

    def _program_of(self, batch: Batch, plan: Plan, situation: Situation) -> Program:
        """The Program for a situation, made once."""
        ages = ages_of(self.model, self.optimizer, self._entries)
        if (key := (*situation, ages)) not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = self.program_by(batch, plan)
        return self._programs[key]

    def program_by(self, batch: Batch, plan: Plan, *, exact: bool = False) -> Program:
        """The Program for batches like this one by any plan, made anew."""
        shape, apart = self._shape(batch, dict(ages_of(self.model, self.optimizer, self._entries)))

        graph = partial(self._graph, batch, plan, apart=apart, exact=exact or self.exact)
        program = capture_and_lower(graph, plan, shape, self.progress)
        for said in (*ungiven(batch), *warnings_of(program)):
            if said not in self._said:
                self._said.add(said)
                warnings.warn(said, stacklevel=depth_of_call())
        return program

    def _shape(self, batch: Batch, ages: Mapping[str, object]) -> tuple[StepShape, frozenset[str]]:
        scope, limit = self.traits.scope, self.clip_norm
        shape, apart = optimized_shape(self.model, batch, self.optimizer, scope, limit, ages)
        return replace(shape, has_masters=self.has_masters), apart

    def _graph(
        self, batch: Batch, plan: Plan, microbatches: int, apart: frozenset[str], exact: bool
    ) -> Graph:
        return capture_graph(
            self.model, batch, dp=plan.dp, microbatches=microbatches, loss_fn=self.loss_fn, tp_plan=self.tp_plan,
            frozen=apart, min_units=plan.pp, exact=exact, norms_per_part=plan.batch_norm is BatchNorms.PER_PART,
        )  # fmt: skip


@naming_the_call()
def distribute(
    model: nn.Module, optimizer: torch.optim.Optimizer, cluster: str | Path | Cluster, *, plan: Plan | None = None,
    chips: int | None = None, loss_fn: LossFunction | None = None, clip_norm: float | None = None,
    seed: int = 0, runner: str = "inline", address: str | None = None,
) -> DistributedStep:  # fmt: skip
    """Train `model` with `optimizer` on the chips of `cluster` (a file, a shipped name, or a Cluster).

    `model(**batch)` returns the loss, or `loss_fn` makes it of the output: `loss_fn(output, **batch)`, with those
    entries that it names, or `loss_fn(output, batch)`. Without a `plan` one is chosen at the first batch. `runner`:
    "inline", in this process, or "ray", by actors, which end with `step.close()` or this process; `address`: of the
    Ray cluster that they are on (as `train --address` takes it; None: RAY_ADDRESS, else a Ray of its own). Dropout
    and other random numbers follow from `seed`, the step (`step.steps`, to be set by whoever resumes) and the sample,
    not from torch's generators. Raises UserError.
    """
    require_kinds(
        model=(model, nn.Module), optimizer=(optimizer, torch.optim.Optimizer), plan=(plan, (Plan, NoneType)),
        chips=(chips, (Integral, NoneType)), clip_norm=(clip_norm, (Real, NoneType)), seed=(seed, Integral),
    )  # fmt: skip
    if clip_norm is not None and not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise PlanError(f"clip_norm is {clip_norm}", "distribute", "give a number above 0, or leave it out")
    found = cluster if isinstance(cluster, Cluster) else load_cluster(cluster_path(str(cluster)))
    found = found.take(chips)
    launch = launch_of(found, runner, address)
    try:
        step = DistributedStep(model, optimizer, found, plan, loss_fn, clip_norm, seed, launch)
    except BaseException:
        launch.close()
        raise
    weakref.finalize(step, launch.close)
    return step
