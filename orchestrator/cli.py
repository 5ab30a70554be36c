"""The command line: one verb per question. It reads flags, runs the verb and turns its outcome into an exit code.

Verbs are imported when they run, so that a help text costs neither torch nor ray. Results go to stdout, talk to
stderr. Exit codes: 0 done, 1 the run ended early, 2 the input is wrong, 3 it does not fit, 4 chips hang, 5 the runs
differ, 128 + n ended by signal n. Flags are few on purpose (`verbs.inputs.options` has them all): everything else is
`--set a.b=c`, typed by the job's schema.
"""

import errno
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, get_args, get_origin

import typer

from comms.errors import UserError
from orchestrator.runners.failure import RunPhase
from orchestrator.runners.signals import StopSignal, own_process
from orchestrator.verbs.inputs.options import INTERRUPTED, LAST, VERBS, Options
from orchestrator.views.console import Console, give_up


def main() -> None:
    """What the entry point runs. From here on no signal shows a traceback, and none is lost."""
    own_process()
    try:
        build()()
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        give_up(sys.stdout)  # a help text had no room
        Console().say(f"error: stdout cannot be written: {error.strerror}")
        sys.exit(1)


def run(verb: str, given: Mapping[str, object]) -> int:
    """Run one verb with these flags; its exit code, or that of the error that ended it."""
    console = Console(as_json=given.get("as_json") is True, verbose=given.get("verbose") is True)
    stop = own_process()
    try:
        stop.enter(RunPhase.START)
        options = _options(VERBS[verb], given)
        answer: Callable[[Options, Console], int] = importlib.import_module(f"orchestrator.verbs.{verb}").main
        # What the user's code prints is no part of the document.
        with redirect_stdout(sys.stderr) if console.as_json else nullcontext():
            return answer(options, console)
    except UserError as error:
        console.detail(traceback.format_exc().rstrip())
        console.error(error)
        return error.exit_code
    except SystemExit as end:  # of code of the user's that runs in a step
        from orchestrator.models.user_code import raised

        console.error(raised(end, "a step", "the code that ends the process"))
        return UserError.exit_code
    except StopSignal as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:  # of code that has handlers of its own
        console.say("interrupted")
        return INTERRUPTED
    finally:
        stop.enter(RunPhase.OVER)


def _options(kind: type[Options], given: Mapping[str, object]) -> Options:
    """What typer read, as the verb's options: a shipped cluster's name becomes its file, lists become tuples."""
    asked = {name: value for name, value in given.items() if value is not None}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    if isinstance(name := asked.get("cluster"), str):
        # Imported here: the schemas behind it cost more than a whole help text.
        from orchestrator.config.hardware.cluster_file import cluster_path

        values["cluster"] = cluster_path(name)
    return kind(**values)  # type: ignore[arg-type]


def build() -> typer.Typer:
    """The command line, not yet run."""
    app = typer.Typer(
        name="orchestrate",
        help="Plan, simulate and run the training of a PyTorch model on a described cluster of chips.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for verb, kind in VERBS.items():
        app.command(verb, help=kind.__doc__)(_command(verb, kind))
    return app


def _command(verb: str, kind: type[Options]) -> Callable[..., None]:
    """A function with one keyword per flag, which is how typer learns what a command takes."""

    def command(**given: object) -> None:
        sys.exit(run(verb, given))

    flags = sorted(fields(kind), key=lambda flag: LAST.index(flag.name) if flag.name in LAST else -1)
    command.__signature__ = Signature([_parameter(flag) for flag in flags])  # type: ignore[attr-defined]
    return command


def _parameter(flag: Field[object]) -> Parameter:
    """A flag as typer knows it: several values are a list, and a cluster may be a name."""
    kind, words = get_args(flag.type)
    default = Parameter.empty if flag.default is MISSING else flag.default
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], default or None  # type: ignore[misc]
    if flag.name == "cluster":
        kind = str | None
    return Parameter(flag.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, words])
