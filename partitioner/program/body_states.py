"""The state in which a body is called: what the body does depends on nothing else, so it is followed once for each."""

from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar


@dataclass(eq=False)
class BodyState:
    """Tables of what a microbatch (or the role) holds; compared by identity, see `BodyStates`."""

    def copy(self) -> Self:
        """The same contents, to be followed on from."""
        return type(self)(*(table.copy() for table in self._tables()))

    def contents(self) -> object:
        """Equal for equal states, whatever the order in which they came about."""
        return tuple(frozenset(table.items()) for table in self._tables())

    def _tables(self) -> tuple[dict[int, Any], ...]:
        return tuple(vars(self).values())


S = TypeVar("S", bound=BodyState)


class BodyStates(Generic[S]):
    """The states of one schedule, each once, so that one serves as a key; `first`: nothing has happened yet."""

    def __init__(self, first: S) -> None:
        self.first, self._known = first, {first.contents(): first}

    def unique(self, state: S) -> S:
        """The state of these contents that was met first."""
        return self._known.setdefault(state.contents(), state)
