"""Pending communications: where chips of one process exchange tensors, with each other and with chips elsewhere.

The n-th post on a channel joins the n-th posts of the other members (`Key`). A collective is
carried out once everything is there; contributions are always combined in chip order and in a stated accumulation
type (float32 for half precision), so results have the same bytes for any number of actors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from orchestrator.runners.executing.chip import ExecutingChip
from orchestrator.runners.executing.header import BadMessage
from partitioner.program.machine import Key, Post
from partitioner.program.program import Collective, CollectiveOp, Recv, Reduction, Send

MAX_OPEN = 1 << 20  # communications that have begun and not ended
LOW_PRECISION = (torch.float16, torch.bfloat16)
CHUNKED = (CollectiveOp.REDUCE_SCATTER, CollectiveOp.ALL_TO_ALL)
PAIR = 2
COMBINE: dict[Reduction, Callable[..., torch.Tensor]] = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,  # divided by the number of parts at the end
    Reduction.MAX: torch.maximum,
    Reduction.MIN: torch.minimum,
}


@dataclass
class PendingCommunication:
    """What has arrived for one key so far: posts of local chips, and tensors by the chip they come from."""

    posts: dict[int, Post] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


class PendingCommunications:
    """All that are pending in a process. Not thread-safe by itself: the caller holds the lock of `ChipSet`."""

    def __init__(self, chips: dict[int, ExecutingChip], actor_of: Sequence[int], actor: int) -> None:
        self.chips, self.actor_of, self.actor = chips, actor_of, actor
        self.open: dict[Key, PendingCommunication] = {}

    def post(self, chip: int, post: Post) -> bool:
        """Register a post; True when it is complete and may be carried out."""
        pending = self.open.setdefault(post.key, PendingCommunication())
        pending.posts[chip] = post
        if not isinstance(post.instruction, Recv):  # taken now: the stream may free it before the others come
            pending.values[chip] = self._value(chip, post)
        return self._is_complete(post.key, pending)

    def deliver(self, key: Key, source: int, tensor: torch.Tensor) -> bool:
        """A contribution from another actor; True when the communication is complete. Raises BadMessage."""
        if len(self.open) >= MAX_OPEN:
            raise BadMessage("more communications than any step has")
        pending = self.open.setdefault(key, PendingCommunication())
        if source in pending.values:
            raise BadMessage(f"{key.kind} {key.chips} #{key.number} of chip {source} twice")
        pending.values[source] = tensor
        return self._is_complete(key, pending)

    def outgoing(self, chip: int, post: Post) -> list[tuple[int, torch.Tensor]]:
        """What this post sends to other actors: (actor, tensor)."""
        actors = {a for c in post.key.chips if (a := self.actor_of[c]) != self.actor}
        instruction = post.instruction
        if not actors or isinstance(instruction, Recv):
            return []
        value = self._value(chip, post)
        if isinstance(instruction, Send):
            return [(actor, value) for actor in actors]
        return [(actor, self._payload(instruction, value, post.key, actor)) for actor in sorted(actors)]

    def _value(self, chip: int, post: Post) -> torch.Tensor:
        """What a send or a collective contributes."""
        instruction = post.instruction
        tensor = instruction.reads[0] if isinstance(instruction, Collective) else instruction.tensor
        return self.chips[chip].read(tensor, post.microbatch)

    def _payload(self, instruction: Collective, value: torch.Tensor, key: Key, actor: int) -> torch.Tensor:
        if instruction.op not in CHUNKED:
            return value
        chunks = value.chunk(len(key.chips))
        theirs = [chunks[i] for i, c in enumerate(key.chips) if self.actor_of[c] == actor]
        return theirs[0] if len(theirs) == 1 else torch.cat(theirs)

    def _is_complete(self, key: Key, pending: PendingCommunication) -> bool:
        if key.kind == "p2p":
            source, target = key.chips
            if self.actor_of[target] != self.actor:
                return source in pending.posts
            return target in pending.posts and source in pending.values
        return len(pending.values) == len(key.chips)

    def carry_out(self, key: Key) -> list[int]:
        """Move or combine the tensors of a complete one; returns the local chips for which it has finished."""
        pending = self.open.pop(key)
        if key.kind == "p2p":
            source, target = key.chips
            if target in pending.posts:
                receive = pending.posts[target]
                assert isinstance(receive.instruction, Recv)
                self.chips[target].write(
                    receive.instruction.tensor, receive.microbatch, pending.values[source]
                )
        else:
            self._combine(key, pending)
        return list(pending.posts)

    def _combine(self, key: Key, pending: PendingCommunication) -> None:
        first = next(iter(pending.posts.values())).instruction
        assert isinstance(first, Collective)
        targets = [c for c in key.chips if c in pending.posts]
        if first.op in CHUNKED:
            self._combine_chunks(first, key, pending, targets)
            return
        parts = [pending.values[c] for c in key.chips]
        if first.op is CollectiveOp.ALL_GATHER:
            self._gather(pending, key, parts)
            return
        result = (
            parts[0]
            if first.op is CollectiveOp.BROADCAST
            else self._reduce(first.reduction, parts, pending, key)
        )
        for chip in targets:
            self._put(chip, pending.posts[chip], result)

    def _put(self, chip: int, post: Post, value: torch.Tensor) -> None:
        assert isinstance(post.instruction, Collective)
        self.chips[chip].write(post.instruction.writes[0], post.microbatch, value)

    def _reduce(
        self, reduction: Reduction, parts: list[torch.Tensor], pending: PendingCommunication, key: Key
    ) -> torch.Tensor:
        """Combine in chip order; in place in the first chip's own buffer where that is also its result."""
        post = pending.posts.get(key.chips[0])
        in_place = (
            post is not None and isinstance(post.instruction, Collective)
            and post.instruction.reads == post.instruction.writes and parts[0].dtype not in LOW_PRECISION
        )  # fmt: skip
        return combine(reduction, parts, parts[0] if in_place else None)

    def _combine_chunks(
        self, first: Collective, key: Key, pending: PendingCommunication, targets: list[int]
    ) -> None:
        for position, chip in enumerate(targets):
            parts = []
            for source in key.chips:
                is_remote = source not in pending.posts
                chunks = pending.values[source].chunk(len(targets) if is_remote else len(key.chips))
                parts.append(chunks[position if is_remote else key.chips.index(chip)])
            if first.op is CollectiveOp.ALL_TO_ALL:
                self._put(chip, pending.posts[chip], torch.cat(parts))
            else:
                post = pending.posts[chip]
                self._put(chip, post, combine(first.reduction, parts, self._room_for(chip, post, parts)))

    def _room_for(self, chip: int, post: Post, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """The buffer that two parts are combined into at once, be it that one of them lies there."""
        assert isinstance(post.instruction, Collective)
        target = post.instruction.writes[0]
        if len(parts) != PAIR or not self.chips[chip].is_buffer(target):
            return None
        buffer = self.chips[chip].read(target, post.microbatch)
        return buffer if (buffer.dtype, buffer.shape) == (parts[0].dtype, parts[0].shape) else None

    def _gather(self, pending: PendingCommunication, key: Key, parts: list[torch.Tensor]) -> None:
        shared: torch.Tensor | None = None
        for chip, post in pending.posts.items():
            assert isinstance(post.instruction, Collective)
            target = post.instruction.writes[0]
            if self.chips[chip].is_buffer(target):
                buffer = self.chips[chip].read(target, post.microbatch)
                for slot, part in zip(buffer.chunk(len(key.chips)), parts, strict=True):
                    if slot.data_ptr() != part.data_ptr():
                        slot.copy_(part)
            else:
                shared = torch.cat(parts) if shared is None else shared
                self._put(chip, post, shared)


def combine(reduction: Reduction, parts: Sequence[torch.Tensor], out: torch.Tensor | None) -> torch.Tensor:
    """`parts` combined from first to last, accumulated in float32 for half precision.

    `out` may lie where the first or the second of the parts does, with its offset; not where a later one does.
    """
    if parts[0].dtype in LOW_PRECISION:
        return combine(reduction, [p.float() for p in parts], None).to(parts[0].dtype)
    if len(parts) == 1:
        return parts[0].clone() if out is None else out.copy_(parts[0])
    total = COMBINE[reduction](parts[0], parts[1], out=torch.empty_like(parts[0]) if out is None else out)
    for part in parts[2:]:
        COMBINE[reduction](total, part, out=total)
    return total.div_(len(parts)) if reduction is Reduction.AVG else total
