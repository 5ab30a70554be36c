"""Signals that ask a process to end: one object has the handlers, from before anything is started to the very end.

What a signal does is decided by `failure.interrupted`. Before the first step it raises `StopSignal` wherever the main
thread is (or as soon as a command is begun); in a run of training it is remembered, and the loop looks. A process that
the command line owns never shows a traceback for it: a second Ctrl-C leaves the process at once, and once Python takes
itself apart signals have their default effect. Signals that somebody has decided on, as `nohup` on SIGHUP, are left
alone.

Processes that are forked from this one, as workers of data loaders, ignore all but SIGTERM: they end with this one.
Python runs handlers in the main thread only, between its own instructions.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from orchestrator.runners.failure import RunEnd, RunPhase, interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OF_TERMINALS = (
    signal.SIGHUP,
    signal.SIGUSR1,
)  # what goes to all processes of a session or of a batch job's step
SHELL = 128  # exit codes of processes that a signal ended, as shells say them
SHOW_CURSOR = b"\x1b[?25h"


class StopSignal(KeyboardInterrupt):
    """A signal came before anything was trained."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.name, self.exit_code = number.name, SHELL + number


class StopRequest:
    """Which signals have come, and what the next one does. It is the handler of all of them."""

    def __init__(self, *, owns_process: bool) -> None:
        self.owns_process = owns_process
        self.received: list[signal.Signals] = []
        self._phase, self._pid = RunPhase.COMING, os.getpid()
        self._before: dict[signal.Signals, object] = {}
        self._terminals = [fd for fd in (0, 1, 2) if _is_terminal(fd)]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Carry out what is decided; called by Python, in the main thread."""
        del frame
        came = signal.Signals(number)
        if os.getpid() != self._pid:
            if came is signal.SIGTERM:  # how a data loader ends its workers
                signal.signal(came, signal.SIG_DFL)
                os.kill(os.getpid(), came)
            return
        if "ray" in sys.modules:  # whose own handler of SIGTERM, until ours is back, aborts in three seconds
            signal.alarm(0)
        self.received.append(came)
        end = interrupted(self.received, self._phase)
        self._say(f"{came.name}: {end}")
        if end is RunEnd.AT_ONCE:
            self._leave(came)
        if end is RunEnd.UNSTARTED and self._phase is RunPhase.START:
            raise StopSignal(came)

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return bool(self.received)

    @property
    def name(self) -> str:
        """The first signal's."""
        return self.received[0].name

    @property
    def exit_code(self) -> int:
        """That of a run which ended for the first signal."""
        return SHELL + self.received[0]

    def enter(self, phase: RunPhase) -> None:
        """From now on a signal does what it does in this phase; one that has come before is not lost.

        Ray's libraries take SIGTERM over, past Python, when they start: it is taken back with every phase.
        """
        self._phase = phase
        if self._before:
            self.install()
        if self.received and phase is not RunPhase.OVER:
            raise StopSignal(self.received[0])

    def install(self) -> None:
        """Take over the signals that nobody has decided on, and those that others took over since."""
        for each in SIGNALS:
            current = signal.getsignal(each)
            if each in self._before or current in (signal.SIG_DFL, signal.default_int_handler):
                self._before.setdefault(each, current)
                signal.signal(each, self)

    def uninstall(self) -> None:
        """Give them back."""
        for each, before in self._before.items():
            signal.signal(each, before)  # type: ignore[arg-type]
        self._before.clear()

    def _leave(self, came: signal.Signals) -> None:
        if not self.owns_process:
            raise StopSignal(came)
        if 2 in self._terminals:  # a display that moves may have hidden it
            with suppress(OSError):
                os.write(2, SHOW_CURSOR)
        os._exit(SHELL + came)

    def _say(self, text: str) -> None:
        """On stderr, past all that is buffered. A terminal that is gone takes nothing more, from anybody."""
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())
            return
        for fd in self._terminals:
            if not _is_terminal(fd):
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_RDWR), fd)


def own_process() -> StopRequest:
    """The handlers of a process that ends with its command; installed if this is its main thread."""
    if (current := _current()) is not None:
        return current
    made = StopRequest(owns_process=True)
    if threading.current_thread() is threading.main_thread():
        made.install()
        atexit.register(_give_way)
    return made


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """The handlers of the process, if it has them, else some for this block (none outside of the main thread)."""
    if (current := _current()) is not None:
        yield current
        return
    made = StopRequest(owns_process=False)
    if threading.current_thread() is not threading.main_thread():
        yield made
        return
    made.install()
    try:
        yield made
    finally:
        made.uninstall()


@contextmanager
def held_back(signals: tuple[signal.Signals, ...] = SIGNALS) -> Iterator[None]:
    """Signals wait until the block is over; threads and processes that are started in it never see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reclaim() -> None:
    """Be the first to hear of signals again, where a library has put itself before Python's own handler."""
    if threading.current_thread() is threading.main_thread() and (current := _current()) is not None:
        current.install()


def _current() -> StopRequest | None:
    found = (signal.getsignal(each) for each in SIGNALS)
    return next((each for each in found if isinstance(each, StopRequest)), None)


def _give_way() -> None:
    """Python takes itself apart from here on: no handler of its own may run."""
    for each in SIGNALS:
        if isinstance(signal.getsignal(each), StopRequest):
            signal.signal(each, signal.SIG_DFL)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False
