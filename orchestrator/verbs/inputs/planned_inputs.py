"""Planned inputs: from the options of a command to a cluster, a job and perhaps a plan, as every verb needs them.

With nothing given, `train` demonstrates all kinds of parallelism (`DEMONSTRATION`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comms.selection.progress import Progress
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import DEFAULT_CLUSTER, cluster_from, cluster_path
from orchestrator.config.job_file import Job, load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.planning import preparation
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing import fastest_plan
from orchestrator.runs.run_dir import RunDir
from orchestrator.verbs.inputs.options import PlannedOptions
from partitioner.layout.parallel_plan import Plan, plan_from, plan_to_yaml
from partitioner.program.program_codec import encode
from partitioner.program.program_text import to_text

# What `train` shows when neither a job nor a model nor a plan is asked for: every kind of parallelism at once.
DEMONSTRATION = ("plan.tp=2", "plan.pp=2")
DEMONSTRATION_CHIPS = 4  # a multiple of so many
AUTO = "auto"  # as a plan: the fastest that fits; a file of that name is ./auto
# flags that stand for the key of that name in the job file
SHORTCUTS = ("model", "data", "global_batch", "seq", "steps")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a command is about. `document` is the cluster file's content, kept in the run directory."""

    cluster: Cluster
    job: Job
    plan: Plan | None
    document: Mapping[str, object]

    def __post_init__(self) -> None:
        preparation.require_same(self.job, self.plan)

    def config(self, runner: str) -> dict[str, object]:
        """The effective configuration, from which a run that is resumed makes the same inputs."""
        return config_of(runner, self.cluster, self.document, self.job)


def config_of(runner: str, cluster: Cluster, document: Mapping[str, object], job: Job) -> dict[str, object]:
    """What a run directory keeps of a cluster, which is that of `document`, and a job."""
    return {
        "runner": runner, "chips": cluster.num_chips, "cluster": dict(document), "job": job.model_dump(),
    }  # fmt: skip


def resolve(options: PlannedOptions, *, demonstrate: bool = False) -> Inputs:
    """Read the files that the options name. Raises ConfigError, ClusterError or PlanError.

    `demonstrate`: a command that names neither a job nor a model nor a plan shows every kind of parallelism.
    """
    document = read_yaml(options.cluster or cluster_path(DEFAULT_CLUSTER))
    cluster = cluster_from(document).take(options.chips)
    given = {name: getattr(options, name, None) for name in SHORTCUTS}
    shortcuts = [f"{name}={value}" for name, value in given.items() if value is not None]
    demonstration = DEMONSTRATION if demonstrate and _is_bare(options, cluster) else ()
    job = load_job(options.job, (*demonstration, *shortcuts, *options.overrides))
    return Inputs(cluster, job, read_plan(options.plan), document.root)


def _is_bare(options: PlannedOptions, cluster: Cluster) -> bool:
    asked = (
        options.job or options.model or options.plan or any(o.startswith("plan.") for o in options.overrides)
    )
    return not asked and cluster.num_chips % DEMONSTRATION_CHIPS == 0


def prepare(options: PlannedOptions, progress: Progress) -> Prepared:
    """The Program that the options describe. Raises UserError."""
    inputs = resolve(options)
    return fastest_plan.prepare(inputs.cluster, inputs.job, inputs.plan, progress=progress)


def write_prepared(run: RunDir, prepared: Prepared) -> None:
    """Keep the plan, to be edited, and what it became."""
    run.write_plan(plan_to_yaml(prepared.plan))
    run.write_program(to_text(prepared.program), encode(prepared.program))


def read_plan(path: Path | None) -> Plan | None:
    """The plan in a file; None where it is to be searched for."""
    if path is None or str(path) == AUTO:
        return None
    document = read_yaml(path)
    return plan_from(document.root, document.where)
