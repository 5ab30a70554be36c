"""Views in a trace without writes: what plain torch sees in place may there lie in another order, and is reshaped.

A write becomes a new value, whose strides are not always those of what was written into: `view` would then fail where
it works in plain torch. A reshape gives the same entries, as long as neither is written afterwards: a first forward,
with its writes, says of every call in turn whether that is so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


class Viewed:
    """The calls of `view` in a forward: each with the tensor that was viewed, and how often it was written before."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, int]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note them."""
        self.calls.clear()

        def view(own: Callable[..., Any], value: torch.Tensor, *shape: Any) -> Any:
            self.calls.append((value, value._version))
            return own(value, *shape)

        with _views_by(view):
            yield

    @contextmanager
    def reshaped(self) -> Iterator[None]:
        """Those that were noted, in the same order, as reshapes."""
        calls = iter([value._version == before for value, before in self.calls])

        def view(own: Callable[..., Any], value: torch.Tensor, *shape: Any) -> Any:
            return value.reshape(*shape) if next(calls, False) else own(value, *shape)

        with _views_by(view):
            yield


@contextmanager
def _views_by(view: Callable[..., Any]) -> Iterator[None]:
    own = torch._C.TensorBase.__dict__["view"]

    def called(value: torch.Tensor, *shape: Any, **named: Any) -> Any:
        """As views of other dtypes are called, and those by name: unseen."""
        is_shape = bool(shape) and isinstance(shape[0], int | tuple | list) and not named
        return view(own, value, *shape) if is_shape else own(value, *shape, **named)

    with patch.object(torch.Tensor, "view", called, create=True):
        yield
