"""Signals: each decides once, none is lost, none shows a traceback. In processes of their own, which import little."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.runners.failure import RunPhase
from orchestrator.runners.signals import (
    SIGNALS,
    StopRequest,
    StopSignal,
    held_back,
    own_process,
    stop_request,
)

ROOT = Path(__file__).parents[3]
HEAD = """
import os, signal, sys, time
from orchestrator.runners.failure import RunPhase
from orchestrator.runners.signals import StopSignal, held_back, own_process
def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
stop = own_process()
"""
TRAINING = """
stop.enter(RunPhase.START)
stop.enter(RunPhase.TRAINING)
send({signals})
print("saved", stop.name, flush=True)
stop.enter(RunPhase.OVER)
send({late})
sys.exit(stop.exit_code)
"""
STARTING = """
try:
    stop.enter(RunPhase.START)
    send({signals})
    print("lost")
except StopSignal as stopped:
    send({late})
    sys.exit(stopped.exit_code)
"""
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)


def ended(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [sys.executable, "-c", HEAD + code.format(**{"late": "", **given})], cwd=ROOT, text=True,
        capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in found.stderr
    return found


@each_signal
def test_a_signal_in_training_is_remembered_and_gives_its_exit_code(number: signal.Signals) -> None:
    found = ended(TRAINING, signals=f"{number:d}")
    assert (found.returncode, found.stdout) == (128 + number, f"saved {number.name}\n")
    assert found.stderr == f"{number.name}: ending after this step, which is saved (Ctrl-C ends at once)\n"


@each_signal
def test_a_signal_before_the_first_step_ends_the_process_where_it_is(number: signal.Signals) -> None:
    found = ended(STARTING, signals=f"{number:d}")
    assert (found.returncode, found.stdout) == (128 + number, "")
    assert found.stderr == f"{number.name}: ending\n"


@pytest.mark.parametrize("code", [TRAINING, STARTING], ids=["training", "start"])
def test_ctrl_c_after_any_signal_leaves_at_once(code: str) -> None:
    found = ended(code, signals="signal.SIGINT, signal.SIGINT, signal.SIGINT")
    if code is TRAINING:
        assert (found.returncode, found.stdout) == (130, "")
        assert found.stderr.endswith("SIGINT: ended at once, without saving\n")
    found = ended(code, signals="signal.SIGTERM", late="signal.SIGINT")
    assert found.returncode == 130


def test_other_signals_after_the_first_change_nothing() -> None:
    found = ended(TRAINING, signals="signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP", late="signal.SIGTERM")
    assert (found.returncode, found.stdout) == (138, "saved SIGUSR1\n")
    assert found.stderr.count("SIGTERM: ending already") == 2


def test_a_signal_that_comes_before_a_command_is_begun_is_not_lost() -> None:
    found = ended("send(signal.SIGTERM)\n" + STARTING, signals="")
    assert (found.returncode, found.stdout) == (143, "")


def test_a_signal_while_python_takes_itself_apart_ends_it_without_a_word() -> None:
    late = (
        "class Late:\n    def __del__(self): os.kill(os.getpid(), 2)\nstop.late = Late(); sys.late = Late()\n"
    )
    assert ended(late, signals="").returncode in (-signal.SIGINT, 0)


def test_what_nohup_ignores_stays_ignored() -> None:
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + HEAD + TRAINING
    found = subprocess.run(
        [sys.executable, "-c", code.format(signals="signal.SIGHUP, signal.SIGTERM", late="")], cwd=ROOT, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (143, "saved SIGTERM\n")


def test_a_terminal_that_is_gone_takes_nothing_more_and_nothing_fails() -> None:
    """stderr is a terminal whose other end is closed: writing to it fails from then on."""
    code = """
stop.enter(RunPhase.START)
stop.enter(RunPhase.TRAINING)
print("begun", flush=True)
sys.stdin.read()
send(signal.SIGHUP)
print("said to nobody", file=sys.stderr, flush=True)
print("saved", flush=True)
sys.exit(stop.exit_code)
"""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    os.close(theirs)
    os.close(ours)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (129, b"saved\n")


def test_forked_workers_ignore_what_is_meant_for_this_process_but_end_when_told() -> None:
    code = """
stop.enter(RunPhase.START)
stop.enter(RunPhase.TRAINING)
read, write = os.pipe()
worker = os.fork()
if worker == 0:
    send(signal.SIGINT, signal.SIGHUP, signal.SIGINT)
    os.write(write, b"alive")
    time.sleep(60)
os.read(read, 5)
os.kill(worker, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(worker, 0)[1]), stop.is_set(), flush=True)
"""
    found = ended(code)
    assert (found.stdout, found.stderr) == ("15 False\n", "")


def test_children_that_are_started_while_signals_are_held_back_never_see_them() -> None:
    code = """
import subprocess
with held_back((signal.SIGHUP, signal.SIGUSR1)):
    child = subprocess.Popen(["sleep", "60"])
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
    child.send_signal(number)
print(child.wait(), flush=True)
"""
    assert ended(code).stdout == "-15\n"


@pytest.fixture
def default_handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each in SIGNALS:
        signal.signal(each, signal.default_int_handler if each is signal.SIGINT else signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def test_called_from_python_handlers_are_there_for_the_run_and_nothing_leaves_the_process(
    default_handlers: None,
) -> None:
    with stop_request() as stop:
        stop.enter(RunPhase.START)
        stop.enter(RunPhase.TRAINING)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.is_set(), stop.name, stop.exit_code) == (True, "SIGTERM", 143)
        with pytest.raises(StopSignal):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_has_handlers_uses_them_for_its_run(default_handlers: None) -> None:
    own = own_process()
    with stop_request() as stop:
        assert stop is own is own_process()
    assert signal.getsignal(signal.SIGHUP) is own


def test_another_thread_has_no_handlers(default_handlers: None) -> None:
    found: list[StopRequest] = []

    def run() -> None:
        with stop_request() as stop:
            found.append(stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not found[0].is_set() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_held_back_comes_after(default_handlers: None) -> None:
    with stop_request() as stop:
        with held_back():
            signal.raise_signal(signal.SIGTERM)
            assert not stop.is_set()
        assert stop.is_set()


def test_a_handler_that_a_library_sets_past_python_is_replaced_when_training_begins() -> None:
    """As Ray's libraries do; faulthandler is one that can be had without them."""
    code = """
import faulthandler
stop.enter(RunPhase.START)
faulthandler.register(signal.SIGTERM, chain=False)
stop.enter(RunPhase.TRAINING)
send(signal.SIGTERM)
print(stop.name, flush=True)
"""
    found = ended(code)
    assert found.stdout == "SIGTERM\n" and "Current thread" not in found.stderr
