"""The command line: one verb per question. It reads flags, runs the verb and turns its outcome into an exit code.

Verbs are imported when they run, so that a help text costs neither torch nor ray. Results go to stdout, talk to
stderr. Exit codes: 0 done, 1 the run ended early, 2 the input is wrong, 3 it does not fit, 4 chips hang, 5 the runs
differ, 130 interrupted. Flags are few on purpose: everything else is `--set a.b=c`, typed by the job's schema.
"""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args

import typer

from orchestrator.errors import OrchestrateError, UserError
from orchestrator.verbs.inputs.options import Options, RunnerKind, Subject
from orchestrator.views.console import Console

INTERRUPTED = 130

# Every flag there is: the field of Options that it fills, its type, and how it reads on the command line.
FLAGS: dict[str, object] = {
    "cluster": Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Cluster file, or a shipped one by its bare name.")
    ],
    "job": Annotated[
        Path | None, typer.Option(metavar="FILE", help="Job file: model, data, optimizer, plan, steps.")
    ],
    "model": Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="builtin:NAME, hf:NAME, path.py:factory or pkg.module:factory."),
    ],
    "data": Annotated[str | None, typer.Option(metavar="PATH", help="A text file or a folder of them.")],
    "plan": Annotated[
        Path | None, typer.Option(metavar="FILE", help="A saved plan to use instead of a new one.")
    ],
    "chips": Annotated[int | None, typer.Option(min=1, help="Take this many chips of the cluster.")],
    "global_batch": Annotated[int | None, typer.Option(min=1, help="Sequences per step, over all chips.")],
    "seq": Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")],
    "steps": Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")],
    "runner": Annotated[RunnerKind | None, typer.Option(help="Who executes the plan.")],
    "run_dir": Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write results here; must not exist yet.")
    ],
    "resume": Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue the run in this folder.")
    ],
    "overrides": Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
    ],
    "op": Annotated[
        str | None,
        typer.Option(metavar="OP", help="all_reduce (the default), all_gather, all_to_all, barrier, ..."),
    ],
    "size": Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of the collective, with a unit: 64MiB.")
    ],
    "algorithm": Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="auto, a name, synthesized, or a file with a schedule."),
    ],
    "fidelity": Annotated[
        Literal["closed", "folded", "full"] | None,
        typer.Option(help="How closely it is timed; full moves every message."),
    ],
    "sweep": Annotated[
        str | None, typer.Option(metavar="LOW..HIGH", help="Sizes from LOW to HIGH, doubling: 1KiB..1GiB.")
    ],
    "tiers": Annotated[
        bool, typer.Option("--tiers", help="Latency and rate of every tier, from core to core outwards.")
    ],
    "plot": Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture into this file.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Plan and simulate; start nothing.")],
    "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Say more, with tracebacks.")],
}
# A flag that takes other values, or means something else, at one verb.
AT_VERB: dict[tuple[str, str], object] = {
    ("calibrate", "cluster"): Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Cluster that the tables were measured on.")
    ],
    ("calibrate", "op"): Annotated[
        str | None, typer.Option(metavar="OP", help="Operation of tables that do not say it: all_reduce, ...")
    ],
    ("calibrate", "chips"): Annotated[
        int | None, typer.Option(min=2, help="Number of chips of tables that do not say it.")
    ],
    ("simulate", "fidelity"): Annotated[
        Literal["folded", "full"] | None,
        typer.Option(help="One chip per stage, or every chip and every message."),
    ],
}
# What is given without a flag.
ARGUMENTS: dict[str, object] = {
    "file": Annotated[Path, typer.Argument(metavar="FILE", help="A cluster, job or chip file.")],
    "subject": Annotated[
        Subject, typer.Argument(metavar="links", help="What the tables are measurements of.")
    ],
    "tables": Annotated[
        list[Path], typer.Argument(metavar="TABLE", help="nccl-tests output or CSV, one run each.")
    ],
}

_TALK = ("as_json", "verbose")
_INPUTS = ("cluster", "job", "model", "plan", "chips", "global_batch", "seq")
_PLANNED = (*_INPUTS, "run_dir")

# Verb to the question that it answers and the flags that mean something to it.
VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "check": ("Is this file valid, and what does it describe?", ("file", *_TALK)),
    "plan": ("How is the model split, does it fit, how long is a step?", (*_PLANNED, "overrides", *_TALK)),
    "simulate": (
        "How long is a step at any scale, where does the time go, what does it cost?",
        (*_PLANNED, "fidelity", "overrides", *_TALK),
    ),
    "train": (
        "Train with real tensors, prediction beside measurement.",
        (*_PLANNED, "data", "steps", "runner", "resume", "overrides", "dry_run", *_TALK),
    ),
    "verify": (
        "Is the split run the same training run as on one chip?",
        (*_INPUTS, "overrides", *_TALK),
    ),
    "comms": (
        "What does moving bytes between chips take, by which algorithm, over which links?",
        ("cluster", "op", "size", "chips", "algorithm", "fidelity", "sweep", "tiers", "plot", *_TALK),
    ),
    "calibrate": (
        "Which latency and bandwidth do measurements show, and how well do they fit?",
        ("subject", "tables", "cluster", "op", "chips", "plot", *_TALK),
    ),
    "doctor": ("Is this machine ready? Versions, cores, memory, chips, Ray.", _TALK),
}


class Verb(Protocol):
    """What each module of `verbs` that is named after a verb offers."""

    def main(self, options: Options, console: Console) -> int:
        """Answer the verb's question and return the exit code. Raises UserError."""


def main() -> None:
    """The entry point `orchestrate`."""
    build()()


def run(verb: str, given: Mapping[str, object]) -> int:
    """Run one verb with these flags; its exit code, or that of the error that ended it."""
    console = Console(as_json=given.get("as_json") is True, verbose=given.get("verbose") is True)
    try:
        options = _options(given)
        module: Verb = importlib.import_module(f"orchestrator.verbs.{verb}")
        return module.main(options, console)
    except OrchestrateError as error:
        console.detail(traceback.format_exc().rstrip())
        if isinstance(error, UserError):
            console.error(error)
        else:
            console.say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        console.say("interrupted")
        return INTERRUPTED


def _options(given: Mapping[str, object]) -> Options:
    """What typer read, as Options: a shipped cluster's name becomes its file, lists become tuples."""
    fields = dict(given)
    if isinstance(name := given.get("cluster"), str):
        # Imported here: the schemas behind it cost more than a whole help text.
        from orchestrator.config.shipped import cluster_path

        fields["cluster"] = cluster_path(name)
    for several in ("overrides", "tables"):
        values = given.get(several)
        fields[several] = tuple(values) if isinstance(values, list) else ()
    return Options(**fields)  # type: ignore[arg-type]


def build() -> typer.Typer:
    """The command line, not yet run."""
    app = typer.Typer(
        name="orchestrate",
        help="Plan, simulate and run the training of a PyTorch model on a described cluster of chips.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for verb, (question, flags) in VERBS.items():
        app.command(verb, help=question)(_command(verb, flags))
    return app


def _command(verb: str, flags: tuple[str, ...]) -> Callable[..., None]:
    """A function with one keyword per flag, which is how typer learns what a command takes."""

    def command(**given: object) -> None:
        sys.exit(run(verb, given))

    parameters = [_parameter(verb, flag) for flag in flags]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameter(verb: str, flag: str) -> Parameter:
    if flag in ARGUMENTS:
        return Parameter(flag, Parameter.KEYWORD_ONLY, annotation=ARGUMENTS[flag])
    annotation = AT_VERB.get((verb, flag), FLAGS[flag])
    default = False if get_args(annotation)[0] is bool else None
    return Parameter(flag, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
