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
from itertools import takewhile
from typing import Annotated, get_args, get_origin

import typer

from comms.errors import ConfigError, RunError, UserError
from orchestrator.runners.failure import RunPhase
from orchestrator.runners.signals import StopSignal, own_process
from orchestrator.verbs.inputs.options import INTERRUPTED, LAST, VERBS, Options
from orchestrator.views.console import Console, give_up

DISTRIBUTION = "orchestrate-chips"


def main() -> None:
    """What the entry point runs. From here on no signal shows a traceback, and none is lost."""
    own_process()
    ours = takewhile("--".__ne__, sys.argv[1:])  # what follows is a job's
    try:
        _answered_in_json() if "--json" in ours else build()()
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        give_up(sys.stdout)  # a help text had no room
        Console().say(f"error: stdout cannot be written: {error.strerror}")
        sys.exit(1)


def _answered_in_json() -> None:
    """The command line, where words that it does not know are an error in the document, too."""
    try:
        sys.exit(build()(standalone_mode=False, prog_name="orchestrate"))
    except Exception as error:
        if not hasattr(error, "format_message"):  # which those of the parser have
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "orchestrate"
        console = Console(as_json=True)
        console.error(ConfigError(error.format_message(), "command line", f"see {command} --help"))
        console.close()
        sys.exit(UserError.exit_code)


def run(verb: str, given: Mapping[str, object]) -> int:
    """Run one verb with these flags; its exit code, or that of the error that ended it."""
    console = Console(as_json=given.get("as_json") is True, verbose=given.get("verbose") is True)
    console.hold()
    code = _outcome(verb, given, console)
    try:
        console.close()
    except UserError as error:
        console.error(error)
        return error.exit_code
    return code


def _outcome(verb: str, given: Mapping[str, object], console: Console) -> int:
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
        return _ended(f"{stopped.name}: ended", stopped.exit_code, console)
    except KeyboardInterrupt:  # of code that has handlers of its own
        return _ended("interrupted", INTERRUPTED, console)
    except BrokenPipeError:
        raise
    except Exception as bug:  # of ours: its traceback follows
        frame = traceback.extract_tb(bug.__traceback__)[-1]
        place, hint = f"{frame.filename}:{frame.lineno}", "report it, with the traceback on stderr"
        console.note_error(UserError(f"{type(bug).__name__}: {bug}", place, hint))
        console.close()
        raise
    finally:
        stop.enter(RunPhase.OVER)


def _ended(words: str, code: int, console: Console) -> int:
    """A run that was ended from outside; its exit code."""
    console.say(words)
    console.note_error(RunError(words))
    return code


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
    app.callback()(_root)
    for verb, kind in VERBS.items():
        app.command(verb, help=kind.__doc__)(_command(verb, kind))
    return app


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from importlib import metadata

        try:
            known = metadata.version(DISTRIBUTION)
        except metadata.PackageNotFoundError:  # run from a checkout
            known = "(not installed)"
        Console().results({}, text=f"orchestrate {known}\n")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
]


def _root(version: Version = False) -> None:
    """What all verbs have in common."""


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
