"""Saver: files are written in a thread while steps go on; one thing at a time, and no failure is lost.

What is written must be a copy that nobody changes meanwhile. At most one such copy is held: who wants to save again
waits for the one before. A process that ends at once leaves a folder that does not count (see `checkpoint`).
"""

import threading
from collections.abc import Callable


class Saver:
    """One writer at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Start to write, once what is being written is there. Raises what went wrong with that."""
        self.wait()
        self._thread = threading.Thread(target=self._carry_out, args=(write,), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is written. Raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _carry_out(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # raised where somebody waits for it
            self._failure = error
