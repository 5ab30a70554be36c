"""The command line: one verb per question. It reads flags, runs the verb and turns its outcome into an exit code.

Verbs are imported when they run, so that a help text costs neither torch nor ray. Results go to stdout, talk to stderr.
Exit codes: 0 done, 1 the run ended early, 2 the input is wrong, 3 it does not fit, 4 chips hang, 5 the runs differ,
130 interrupted. Flags are few on purpose: everything else is `--set a.b=c`, checked by the schema of the job.
"""

import importlib
import traceback
from pathlib import Path
from typing import Annotated, Protocol

import typer

from orchestrator.console import Console
from orchestrator.errors import UserError
from orchestrator.shipped import cluster_path
from orchestrator.verbs.options import Options, Runner

INTERRUPTED = 130

app = typer.Typer(
    name="orchestrate",
    help="Plan, simulate and run the training of a PyTorch model on a described cluster of chips.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
)

Cluster = Annotated[str | None, typer.Option(metavar="FILE|NAME", help="Cluster file, or a shipped one by name.")]
Job = Annotated[Path | None, typer.Option(metavar="FILE", help="Job file: model, data, optimizer, plan.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="builtin:NAME, hf:NAME, path.py:factory or pkg.module:factory."),
]
Data = Annotated[str | None, typer.Option(metavar="PATH", help="Text file or folder to train on.")]
Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="Use this saved plan instead of making one.")]
Chips = Annotated[int | None, typer.Option(min=1, help="Take this many chips of the cluster.")]
GlobalBatch = Annotated[int | None, typer.Option(min=1, help="Sequences per step, over all chips.")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]
RunnerFlag = Annotated[Runner | None, typer.Option(help="Who executes the plan.")]
RunDir = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write results here; must not exist yet.")]
Resume = Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Continue the run in this folder.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and simulate; start nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show tracebacks.")]


class Verb(Protocol):
    """What every module of `orchestrator.verbs` that is named after a verb offers."""

    def main(self, options: Options, console: Console) -> int:
        """Answer the verb's question; returns the exit code, raises UserError."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A cluster, job or chip file.")],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Is this file valid, and what does it describe?"""
    _run("check", None, Options(file=file, as_json=json, verbose=verbose))


@app.command()
def plan(
    cluster: Cluster = None,
    job: Job = None,
    model: Model = None,
    data: Data = None,
    plan: Plan = None,
    chips: Chips = None,
    global_batch: GlobalBatch = None,
    seq: Seq = None,
    steps: Steps = None,
    run_dir: RunDir = None,
    set_: Set = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How is the model split, does it fit, how long is a step?"""
    options = Options(
        job=job, model=model, data=data, plan=plan, chips=chips, global_batch=global_batch, seq=seq, steps=steps,
        run_dir=run_dir, overrides=tuple(set_ or ()), as_json=json, verbose=verbose,
    )  # fmt: skip
    _run("plan", cluster, options)


@app.command()
def simulate(
    cluster: Cluster = None,
    job: Job = None,
    model: Model = None,
    data: Data = None,
    plan: Plan = None,
    chips: Chips = None,
    global_batch: GlobalBatch = None,
    seq: Seq = None,
    steps: Steps = None,
    run_dir: RunDir = None,
    set_: Set = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How long is a step at any scale, where does the time go, what does it cost?"""
    options = Options(
        job=job, model=model, data=data, plan=plan, chips=chips, global_batch=global_batch, seq=seq, steps=steps,
        run_dir=run_dir, overrides=tuple(set_ or ()), as_json=json, verbose=verbose,
    )  # fmt: skip
    _run("simulate", cluster, options)


@app.command()
def train(
    cluster: Cluster = None,
    job: Job = None,
    model: Model = None,
    data: Data = None,
    plan: Plan = None,
    chips: Chips = None,
    global_batch: GlobalBatch = None,
    seq: Seq = None,
    steps: Steps = None,
    runner: RunnerFlag = None,
    run_dir: RunDir = None,
    resume: Resume = None,
    set_: Set = None,
    json: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Run the plan with real tensors, prediction beside measurement."""
    options = Options(
        job=job, model=model, data=data, plan=plan, chips=chips, global_batch=global_batch, seq=seq, steps=steps,
        runner=runner, run_dir=run_dir, resume=resume, overrides=tuple(set_ or ()), as_json=json, dry_run=dry_run,
        verbose=verbose,
    )  # fmt: skip
    _run("train", cluster, options)


@app.command()
def verify(
    cluster: Cluster = None,
    job: Job = None,
    model: Model = None,
    data: Data = None,
    plan: Plan = None,
    chips: Chips = None,
    global_batch: GlobalBatch = None,
    seq: Seq = None,
    steps: Steps = None,
    runner: RunnerFlag = None,
    run_dir: RunDir = None,
    set_: Set = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Is the split run the same training run as on one chip?"""
    options = Options(
        job=job, model=model, data=data, plan=plan, chips=chips, global_batch=global_batch, seq=seq, steps=steps,
        runner=runner, run_dir=run_dir, overrides=tuple(set_ or ()), as_json=json, verbose=verbose,
    )  # fmt: skip
    _run("verify", cluster, options)


@app.command()
def doctor(json: Json = False, verbose: Verbose = False) -> None:
    """Is this machine ready? Versions, cores, memory, chips, Ray."""
    _run("doctor", None, Options(as_json=json, verbose=verbose))
