"""Attributes of torch's modules and classes that are others while a forward runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

INHERITED = object()


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, object]]) -> Iterator[None]:
    """Inside the block these (owner, name) are these values. As `mock.patch.object`, which takes long for many."""
    before: list[tuple[Any, str, object]] = []
    try:
        for owner, name, value in replacements:
            before.append((owner, name, vars(owner).get(name, INHERITED)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
