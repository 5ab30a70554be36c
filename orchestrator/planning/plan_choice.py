"""Choosing a plan where the job leaves degrees open.

A rule, not a search: the least model parallelism whose weights, gradients and optimizer state take at most
`STATE_SHARE` of a chip's memory, tensor parallelism inside a host as long as that fits, pipeline stages beyond
that, and the rest data parallel. Activations are not estimated here; `simulate` measures them on the Program and
says if it fits. What a model cannot be split by is not known here either: degrees that were refused are passed in, and
others are chosen. What `train` shows with nothing given is `verbs.inputs.planned_inputs.DEMONSTRATION`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from comms.errors import PartitionError, PlanError, ProgramError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Dtype, Job
from partitioner.layout.parallel_plan import Plan

Made = TypeVar("Made")
STATE_SHARE = 0.6  # of a chip's memory; the rest is for activations and buffers
MICROBATCHES_PER_STAGE = 2  # at least: a bubble (p-1)/(m+p-1) of about a third
# tokens of one microbatch: enough for efficient matrix multiplications, few enough for activations
PIPELINE_TOKENS, ACCUMULATION_TOKENS = 2048, 8192
# bytes per parameter: (parameter + gradient, optimizer with AdamW's two states and a master copy if low precision)
STATE_BYTES = {Dtype.FP32: (8, 8), Dtype.FP64: (16, 16), Dtype.BF16: (6, 12)}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Degrees that a model cannot be split by, and why. Taken to hold for larger ones too."""

    tp: int
    pp: int
    problem: str

    def covers(self, tp: int, pp: int) -> bool:
        return tp >= self.tp and pp >= self.pp


def first_that_splits(job: Job, cluster: Cluster, num_params: int, made: Callable[[Plan], Made]) -> Made:
    """What `made` makes of the first chosen plan that it does not refuse. Raises PlanError where none is left."""
    refused: list[Refusal] = []
    while True:
        plan = choose_plan(job, cluster, num_params, refused)
        try:
            return made(plan)
        except PartitionError as error:
            is_open = job.plan.tp is None or job.plan.pp is None
            if not is_open or isinstance(error, ProgramError):  # which is no refusal, but our bug
                raise
            refused.append(Refusal(plan.tp, plan.pp, error.problem))


def choose_plan(job: Job, cluster: Cluster, num_params: int, refused: Sequence[Refusal] = ()) -> Plan:
    """The plan of a job for all chips of `cluster`, by none of the degrees that were refused.

    Raises PlanError with the arithmetic when degrees cannot work.
    """
    chips = cluster.num_chips
    given = {"dp": job.plan.dp, "tp": job.plan.tp, "pp": job.plan.pp}
    for sizes in _sizes(chips):
        tps, pps = ([degree] if (degree := given[axis]) else sizes for axis in ("tp", "pp"))
        candidates = [(tp, pp) for tp in tps for pp in pps
                      if chips % (tp * pp) == 0 and given["dp"] in (None, chips // (tp * pp))]  # fmt: skip
        splitting = [c for c in candidates if job.global_batch % (chips // (c[0] * c[1])) == 0]
        if splitting:
            break
    if not candidates:
        known = " x ".join(f"{axis} {size}" for axis, size in given.items() if size)
        raise PlanError(f"{known} does not multiply to {chips} chips", "plan",
                        "change a degree, leave one out (auto), or take other --chips")  # fmt: skip
    if not splitting:
        dp = chips // max(tp * pp for tp, pp in candidates)
        raise PlanError(f"global_batch {job.global_batch} is not a multiple of dp {dp}", "plan",
                        f"use --global-batch {ceil(job.global_batch / dp) * dp}, or a smaller dp")  # fmt: skip
    if refused:
        splitting = _not_refused(splitting, refused, job, cluster)
    tp, pp = min(splitting, key=lambda c: _rank(c, job, cluster, num_params))
    dp = chips // (tp * pp)
    return Plan(
        dp=dp, tp=tp, pp=pp, zero=job.plan.zero, schedule=job.plan.schedule,
        microbatches=choose_microbatches(job, dp, pp), batch_norm=job.plan.batch_norm,
    )  # fmt: skip


def _not_refused(
    candidates: list[tuple[int, int]], refused: Sequence[Refusal], job: Job, cluster: Cluster
) -> list[tuple[int, int]]:
    """Degrees that are left; a tp that spans hosts is no way out, as a model that it does not cut is only copied."""
    widest = job.plan.tp or cluster.chips_per_host
    left = [c for c in candidates if c[0] <= widest and not any(each.covers(*c) for each in refused)]
    if not left:
        least = min(refused, key=lambda each: each.tp), min(refused, key=lambda each: each.pp)
        chips, why = cluster.num_chips, "; ".join(dict.fromkeys(each.problem for each in least))
        given = "change the degrees that are asked for, " if job.plan.tp or job.plan.pp or job.plan.dp else ""
        hint = f"{given}take fewer chips, or a batch of more than {job.global_batch}"
        raise PlanError(f"the model cannot be split over {chips} chips: {why}", f"{chips} chips", hint)
    return left


def choose_microbatches(job: Job, dp: int, pp: int) -> int:
    """Microbatches per step and replica: as asked, else a few per stage and none too large."""
    per_replica = job.global_batch // dp
    if job.microbatches is not None:
        if per_replica % job.microbatches:
            raise PlanError(
                f"{per_replica} sequences per replica (global_batch {job.global_batch} / dp {dp}) do not split into "
                f"{job.microbatches} microbatches", "microbatches", "use a divisor, or leave microbatches at auto",
            )  # fmt: skip
        return job.microbatches
    tokens = ACCUMULATION_TOKENS if pp == 1 else PIPELINE_TOKENS
    wanted = max(MICROBATCHES_PER_STAGE * pp if pp > 1 else 1, ceil(per_replica * job.seq / tokens))
    return next((m for m in range(wanted, per_replica + 1) if per_replica % m == 0), per_replica)


def _sizes(chips: int) -> Iterator[list[int]]:
    """Degrees to choose from: powers of two, and where none of these do whatever divides the number of chips."""
    yield [1 << k for k in range(chips.bit_length())]
    yield [size for size in range(1, chips + 1) if chips % size == 0]


def _rank(
    choice: tuple[int, int], job: Job, cluster: Cluster, num_params: int
) -> tuple[float, bool, int, int]:
    """Smaller is better: least over the share, keeps tp inside a host, little model parallelism, tp before pp."""
    tp, pp = choice
    weights, optimizer = STATE_BYTES[job.dtype]
    shards = cluster.num_chips // (tp * pp) if job.plan.zero else 1
    need = num_params / (tp * pp) * (weights + optimizer / shards)
    memory = min(chip.memory_bytes for chip in cluster.chip_types)
    return max(need - STATE_SHARE * memory, 0.0), tp > cluster.chips_per_host, tp * pp, pp
