"""Mailbox: tensors that belong to no communication of the Program wait here for who asks for them.

Parameters, batches, checkpoint states and measured intervals travel between driver and actors like any other tensor;
their keys say what they are.
"""

import threading

import torch

from orchestrator.runners.executing.header import BadMessage
from partitioner.program.machine import Key

MAX_WAITING = 1 << 20  # tensors that nobody has taken yet: far beyond any model's


class Missing(RuntimeError):
    """A tensor that was announced did not come."""


def value_key(name: str) -> Key:
    """A parameter or buffer."""
    return Key(f"value:{name}", (), 0)


def batch_key(replica: int, microbatch: int, name: str) -> Key:
    """A batch tensor of one microbatch of one replica."""
    return Key(f"batch:{name}", (replica,), microbatch)


def state_key(chip: int, name: str) -> Key:
    """A tensor of a chip's checkpoint state."""
    return Key(f"state:{name}", (chip,), 0)


def marks_key(actor: int) -> Key:
    """The measured intervals of an actor's chips, one row each."""
    return Key("marks", (), actor)


class Mailbox:
    """Tensors by (epoch, key). Thread-safe."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.items: dict[tuple[int, Key], torch.Tensor] = {}
        self.changed = threading.Condition()

    def put(self, epoch: int, key: Key, tensor: torch.Tensor) -> None:
        """A tensor has arrived. Raises BadMessage for one that is there, or one too many."""
        with self.changed:
            if (epoch, key) in self.items or len(self.items) >= MAX_WAITING:
                raise BadMessage(f"{key.kind[:80]} that nobody has asked for")
            self.items[epoch, key] = tensor
            self.changed.notify_all()

    def clear(self) -> None:
        """Forget what nobody took."""
        with self.changed:
            self.items.clear()

    def take(self, epoch: int, key: Key) -> torch.Tensor:
        """Wait for a tensor and take it out. Missing: nothing at all arrived for `patience_s`."""
        with self.changed:
            while (epoch, key) not in self.items:
                if not self.changed.wait(self.patience_s):
                    raise Missing(
                        f"{key.kind} {key.chips} #{key.number} did not come in {self.patience_s:.0f} s"
                    )
            return self.items.pop((epoch, key))
