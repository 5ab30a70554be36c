"""Caught errors: what fails in a trace alone (a value is asked for, a call is refused) must not decide what is trained.

A forward may catch any error, and then do something else. It is refused: in training the error may not come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.overrides import TorchFunctionMode

from comms.errors import CaptureError
from partitioner.capture.source_lines import running_line


class _Failing(TorchFunctionMode):
    """Notes the errors of torch's functions."""

    def __init__(self, noted: list[tuple[BaseException, str]]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.noted.append((error, running_line()))
            raise


@contextmanager
def no_error_caught() -> Iterator[None]:
    """Raises CaptureError if code inside the block caught an error of torch's, or a refusal of ours."""
    noted: list[tuple[BaseException, str]] = []
    made = CaptureError.__init__

    def noting(self: CaptureError, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        noted.append((self, running_line()))

    with patch.object(CaptureError, "__init__", noting), _Failing(noted):
        yield
    if noted:
        error, where = noted[0]
        said = error.problem if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
        problem = f"the forward catches an error that may not come in training ({said.strip().splitlines()[0][:150]})"
        raise CaptureError(problem, where, "leave out the try around it") from error
