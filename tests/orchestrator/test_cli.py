"""Claims about the command line: flags arrive as TrainOptions, outcomes become exit codes, streams stay apart."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from comms.errors import FitError, HangError, RunError, UserError
from orchestrator import cli
from orchestrator.runners.signals import StopSignal
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.views.console import Console

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], int]], list[TrainOptions]]:
    """Put a verb in the place of the real one; what it was asked is in the list."""

    def replace(name: str, outcome: Callable[[], int]) -> list[TrainOptions]:
        asked: list[TrainOptions] = []
        module = ModuleType(name)

        def main(options: TrainOptions, console: Console) -> int:
            asked.append(options)
            return outcome()

        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"orchestrator.verbs.{name}", module)
        return asked

    return replace


def raising(error: BaseException) -> Callable[[], int]:
    def outcome() -> int:
        raise error

    return outcome


def test_nothing_given_is_none_everywhere(orchestrate, verb):
    asked = verb("train", lambda: 0)
    assert orchestrate("train").code == 0
    assert [vars(each) for each in asked] == [vars(TrainOptions())]


def test_every_flag_reaches_the_verb(orchestrate, verb, tmp_path):
    asked = verb("train", lambda: 0)
    cluster = tmp_path / "mine.yaml"
    cluster.write_text("")
    words: Sequence[str] = (
        f"--cluster {cluster} --job j.yaml --model builtin:gpt-mini --data texts --plan p.yaml --chips 8"
        " --global-batch 32 --seq 256 --steps 7 --runner inline --run-dir out --resume old"
        " --set a.b=1 --set c=x --json --dry-run -v"
    ).split()
    assert orchestrate("train", *words).code == 0
    assert [vars(each) for each in asked] == [
        vars(
            TrainOptions(
                cluster=cluster,
                job=Path("j.yaml"),
                model="builtin:gpt-mini",
                data="texts",
                plan=Path("p.yaml"),
                chips=8,
                global_batch=32,
                seq=256,
                steps=7,
                runner=RunnerKind.INLINE,
                run_dir=Path("out"),
                resume=Path("old"),
                overrides=("a.b=1", "c=x"),
                as_json=True,
                dry_run=True,
                verbose=True,
            )
        )
    ]


def test_a_shipped_cluster_is_found_by_its_bare_name(orchestrate, verb):
    asked = verb("plan", lambda: 0)
    assert orchestrate("plan", "--cluster", "laptop").code == 0
    assert asked[0].cluster is not None
    assert asked[0].cluster.read_bytes() == (ROOT / "cluster_configs" / "laptop.yaml").read_bytes()


def test_a_file_wins_over_a_shipped_cluster_of_the_same_name(orchestrate, verb, tmp_path, monkeypatch):
    asked = verb("plan", lambda: 0)
    (tmp_path / "laptop").write_text("")
    monkeypatch.chdir(tmp_path)
    assert orchestrate("plan", "--cluster", "laptop").code == 0
    assert asked[0].cluster == Path("laptop")


def test_a_misspelt_cluster_is_answered_with_the_nearest(orchestrate):
    ran = orchestrate("plan", "--cluster", "labtop")
    assert ran.code == 2
    assert "did you mean 'laptop'?" in ran.err


def test_a_missing_cluster_file_is_answered_with_the_shipped_ones(orchestrate):
    ran = orchestrate("plan", "--cluster", "no/such.yaml")
    assert ran.code == 2
    assert "dgx-a100" in ran.err


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (FitError, 3), (RunError, 1), (HangError, 4)])
def test_a_user_error_is_three_lines_and_its_exit_code(orchestrate, verb, kind, code):
    verb("simulate", raising(kind("it is so", "here", "do this")))
    ran = orchestrate("simulate")
    assert ran.code == code
    assert ran.err == "error: it is so\n  at: here\n  do: do this\n"
    assert ran.out == ""


def test_a_traceback_comes_with_verbose(orchestrate, verb):
    verb("simulate", raising(UserError("it is so", "here", "do this")))
    ran = orchestrate("simulate", "-v")
    assert ran.code == 2
    assert "Traceback" in ran.err


def test_an_error_without_a_place_is_still_one_line(orchestrate, verb):
    verb("simulate", raising(RunError("it broke")))
    ran = orchestrate("simulate")
    assert ran.code == 1
    assert ran.err == "error: it broke\n"


def test_an_interrupt_ends_with_130(orchestrate, verb):
    verb("train", raising(KeyboardInterrupt()))
    ran = orchestrate("train")
    assert ran.code == 130
    assert "interrupted" in ran.err


def test_the_exit_code_of_a_verb_is_passed_on(orchestrate, verb):
    verb("verify", lambda: 5)
    assert orchestrate("verify").code == 5


ERROR = {"problem": "it is so", "where": "here", "hint": "do this"}
STOPS: dict[str, tuple[Callable[[], BaseException], int, str]] = {
    "input": (lambda: UserError(*ERROR.values()), 2, "it is so"),
    "fit": (lambda: FitError("it is so"), 3, "it is so"),
    "interrupt": (KeyboardInterrupt, 130, "interrupted"),
    "signal": (lambda: StopSignal(signal.SIGTERM), 143, "SIGTERM: ended"),
    "user's code": (lambda: SystemExit("bye"), 2, "a step raised SystemExit: bye"),
}


@pytest.mark.parametrize("name", STOPS)
def test_with_json_an_error_is_the_document_and_the_talk_is_the_same(orchestrate, verb, name):
    stop, code, problem = STOPS[name]
    verb("train", raising(stop()))
    plain = orchestrate("train")
    verb("train", raising(stop()))
    told = orchestrate("train", "--json")
    assert (told.code, told.err) == (code, plain.err)
    document = json.loads(told.out)
    assert document["error"]["problem"] == problem
    assert document["error"].keys() == ERROR.keys() and document.keys() == {"error"}


def test_with_json_all_findings_are_told(orchestrate, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("kind: job\nversion: 1\nsteps: 0\nsedd: 3\n")
    told = orchestrate("check", path, "--json")
    document = json.loads(told.out)
    assert [each["where"] for each in document["errors"]] == [f"{path}:3", f"{path}:4"]
    assert document["error"] == document["errors"][0]


def test_with_json_an_error_after_the_answer_stands_beside_it(orchestrate, monkeypatch):
    def main(options: TrainOptions, console: Console) -> int:
        console.results({"step_time_s": 2.5})
        raise FitError(*ERROR.values())

    module = ModuleType("simulate")
    module.main = main
    monkeypatch.setitem(sys.modules, "orchestrator.verbs.simulate", module)
    told = orchestrate("simulate", "--json")
    assert (told.code, json.loads(told.out)) == (3, {"step_time_s": 2.5, "error": ERROR})


def test_with_json_a_bug_is_in_the_document_and_keeps_its_traceback(verb, monkeypatch, capsys):
    verb("train", raising(AssertionError("a bug")))
    monkeypatch.setattr(sys, "argv", ["orchestrate", "train", "--json"])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["problem"] == "AssertionError: a bug" and "test_cli.py" in error["where"]


def test_the_version_is_printed_without_torch(orchestrate):
    script = "import sys; sys.argv[1:] = ['--version']\nfrom orchestrator import cli\ntry: cli.main()\n"
    script += "finally: assert not {'torch', 'ray', 'numpy', 'pydantic', 'rich'} & set(sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"orchestrate \d+\.\d+\.\d+\n", done.stdout)


def test_our_own_bugs_keep_their_traceback(verb, monkeypatch):
    verb("train", raising(AssertionError("a bug")))
    monkeypatch.setattr(sys, "argv", ["orchestrate", "train"])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--no-such-flag"),
        ("train", "--chips", "0"),
        ("train", "--runner", "cloud"),
        ("simulate", "--runner", "ray"),
        ("plan", "--resume", "runs/run-0001"),
        ("check",),
        ("no-such-verb",),
    ],
    ids=" ".join,
)
def test_what_a_verb_does_not_know_is_refused(orchestrate, words):
    assert orchestrate(*words).code == 2
    told = orchestrate(*words, "--json")
    assert told.code == 2
    error = json.loads(told.out)["error"]
    assert all(error.values()) and error["problem"] in told.err


def test_flags_of_a_jobs_command_are_not_ours(orchestrate):
    told = orchestrate("jobs", "nothing", "--", "train", "--json")
    assert (told.code, told.out) == (2, "")


def test_check_describes_a_valid_file(orchestrate):
    ran = orchestrate("check", str(ROOT / "cluster_configs" / "laptop.yaml"))
    assert ran.code == 0
    assert "laptop" in ran.out


def test_check_answers_in_json(orchestrate):
    path = str(ROOT / "cluster_configs" / "laptop.yaml")
    ran = orchestrate("check", path, "--json")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["kind"] == "cluster"
    assert document["path"] == path


def test_check_of_a_missing_file_is_an_input_error(orchestrate, tmp_path):
    ran = orchestrate("check", str(tmp_path / "nothing.yaml"))
    assert ran.code == 2
    assert "nothing.yaml" in ran.err


def test_with_json_what_others_print_is_talk(orchestrate, verb):
    verb("train", lambda: sys.stdout.write("printed by a model") and 0)
    told = orchestrate("train", "--json")
    assert told.code == 0 and told.out == "" and "printed by a model" in told.err


def test_code_that_ends_the_process_is_an_error(orchestrate, verb):
    verb("train", raising(SystemExit(0)))
    told = orchestrate("train")
    assert told.code == 2 and "a step raised SystemExit: 0" in told.err


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback() -> None:
    code = """
import builtins, os, signal
from orchestrator import entry
original = builtins.__import__
def importing(name, *rest, **named):
    if name == "typer":
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *rest, **named)
builtins.__import__ = importing
entry.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")
