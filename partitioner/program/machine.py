"""The machine: the sans-I/O interpreter of one chip's instruction stream; and the states that checks follow along one.

Every runner and the static check drive this same machine, so what is timed, proved and run cannot drift apart. It
never touches a tensor, a clock or a socket: `ready()` says what may happen next, `complete()` and `arrive()` say
that it happened.

Rules: instructions issue in order; compute blocks; sends, receives and collectives are posted and finish later;
`Wait` blocks until nothing that writes its tensors is pending. Each pair of chips and each group has one FIFO
channel, so the n-th post on a channel meets the n-th post of the others: `Key`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar

from partitioner.program.instructions import writes
from partitioner.program.program import Body, Collective, Group, Instruction, Program, Recv, Role, Send, Wait


class Key(NamedTuple):
    """One communication, the `number`-th on its channel: "p2p" of (source, target), or "group" of all members."""

    kind: str
    chips: tuple[int, ...]
    number: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive instructions that need nobody else, `start..stop-1` of the body of call `call`."""

    call: int
    microbatch: int
    body: Body
    start: int
    stop: int

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return self.body.instructions[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Post:
    """A send, receive or collective to be started; it has finished when `arrive(key)` is called."""

    call: int
    microbatch: int
    instruction: Send | Recv | Collective
    key: Key


Item: TypeAlias = Run | Post
IsLocal: TypeAlias = Callable[[Instruction], bool]


def needs_nobody(instruction: Instruction) -> bool:
    """The default notion of local: everything but communication."""
    return not isinstance(instruction, Send | Recv | Collective)


class Machine:
    """One chip's position in one schedule of its role.

    `is_local` widens what counts as local: the folded simulator times collectives inside a role by itself.
    """

    def __init__(self, program: Program, chip: int, schedule: str, is_local: IsLocal = needs_nobody) -> None:
        self.program, self.chip, self.is_local = program, chip, is_local
        self.role: Role = program.role_of(chip)
        self.calls = self.role.schedule[schedule]
        self.call = 0
        self.index = 0
        self._channels: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._pending: Counter[tuple[int, int]] = Counter()
        self._open: dict[Key, list[tuple[int, int]]] = {}  # what is under way, and the instances it writes
        self._members: dict[Group, tuple[int, ...]] = {}
        self._skip_empty()

    @property
    def done(self) -> bool:
        """Nothing left to issue and nothing outstanding."""
        return self.call == len(self.calls) and not self._open

    def ready(self) -> Item | None:
        """What may be done next; None if the stream is blocked or at its end."""
        if self.call == len(self.calls):
            return None
        body, microbatch = self._body(), self.calls[self.call].microbatch
        instruction = body.instructions[self.index]
        if isinstance(instruction, Send | Recv | Collective) and not self.is_local(instruction):
            return Post(self.call, microbatch, instruction, self._key(instruction))
        stop = self.index
        while stop < len(body.instructions) and self._is_passable(body.instructions[stop], microbatch):
            stop += 1
        return Run(self.call, microbatch, body, self.index, stop) if stop > self.index else None

    def complete(self, item: Item) -> None:
        """`item`, just given by `ready`, was executed (Run) or started (Post)."""
        if isinstance(item, Run):
            self.index = item.stop
        else:
            self._channels[item.key.kind, item.key.chips] += 1
            written = [self._instance(tensor, item.microbatch) for tensor in writes(item.instruction)]
            self._open[item.key] = written
            self._pending.update(written)
            self.index += 1
        self._skip_empty()

    def arrive(self, key: Key) -> None:
        """The transfer or collective `key` has finished on this chip."""
        self._pending.subtract(self._open.pop(key))

    def blocked_on(self) -> tuple[Key, ...]:
        """Outstanding communications that the next instruction waits for (empty if it does not wait)."""
        if self.call == len(self.calls):
            return tuple(self._open)
        instruction = self._body().instructions[self.index]
        if not isinstance(instruction, Wait):
            return ()
        wanted = {self._instance(t, self.calls[self.call].microbatch) for t in instruction.tensors}
        return tuple(key for key, written in self._open.items() if not wanted.isdisjoint(written))

    def position(self) -> str:
        """Where the stream stands, for messages: chip, body, microbatch, instruction."""
        if self.call == len(self.calls):
            return f"chip {self.chip} ({self.role.name}): at the end"
        call, body = self.calls[self.call], self._body()
        instruction = body.instructions[self.index]
        stream = f"chip {self.chip} ({self.role.name}): {call}"
        return f"{stream} instruction {instruction.id} {instruction}"

    def _body(self) -> Body:
        return self.role.body[self.calls[self.call].body]

    def _skip_empty(self) -> None:
        while self.call < len(self.calls) and self.index == len(self._body().instructions):
            self.call, self.index = self.call + 1, 0

    def _is_passable(self, instruction: Instruction, microbatch: int) -> bool:
        if isinstance(instruction, Wait):
            return not any(self._pending[self._instance(t, microbatch)] for t in instruction.tensors)
        return self.is_local(instruction)

    def _instance(self, tensor: int, microbatch: int) -> tuple[int, int]:
        return tensor, microbatch if self.role.tensors[tensor].is_per_microbatch else -1

    def _key(self, instruction: Send | Recv | Collective) -> Key:
        if isinstance(instruction, Collective):
            group = instruction.group
            if group not in self._members:
                self._members[group] = self.program.members(group, self.chip)
            kind, chips = "group", self._members[group]
        elif isinstance(instruction, Send):
            kind, chips = "p2p", (self.chip, self.program.peer(self.chip, instruction.to))
        else:
            kind, chips = "p2p", (self.program.peer(self.chip, instruction.source), self.chip)
        return Key(kind, chips, self._channels[kind, chips])


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
