"""Host values: numbers that a forward takes from Python, of which a capture keeps those of one call.

What the host draws (`random`, numpy), reads from a clock or counts outside the module would stay as it was at capture.
A forward is run twice on the same tensors: it must call torch's functions in the same order with the same numbers.
"""

import hashlib
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import _disable_current_modes

from comms.errors import CaptureError
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.source_lines import running_line

PYTHONS, NUMPYS = "Python's random", "numpy.random"
KEEPING = {"getstate", "setstate", "get_state", "set_state"}  # of their functions, those that draw nothing
EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new")
NUMBERS = bool | int | float | complex | str | torch.dtype | None


@contextmanager
def no_host_draws(module: torch.nn.Module) -> Iterator[None]:
    """Give generators back as they were: of Python, of numpy, and those that `module` holds.

    Raises CaptureError if the block drew from them, or from the system's. Generators elsewhere are not seen. What
    other threads draw meanwhile from Python's stays drawn, and is none of the block's.
    """
    drawn: list[str] = []
    own, lines, held = threading.get_ident(), dict[tuple[str, int], str](), list(_generators(module))
    before = [_frozen(get()) for _, get, _ in held]

    def urandom(size: int) -> bytes:
        if threading.get_ident() == own:
            drawn.append("the system's random numbers")
        return os.urandom(size)

    try:
        with patch.object(random, "_urandom", urandom), _noting_lines(lines):
            yield
    finally:
        for (name, get, put), state in zip(held, before, strict=True):
            threads = {thread for kind, thread in lines if kind == name}
            is_elsewhere = get == random.getstate and threads and own not in threads
            if _frozen(get()) != state and not is_elsewhere:
                drawn.append(name)
                found = pickle.loads(state)
                put(torch.tensor(list(found), dtype=torch.uint8) if isinstance(found, bytes) else found)
        drew = drawn[0] if drawn else ""
        if drew and not isinstance(sys.exception(), KeyboardInterrupt):
            problem = f"the forward draws from {drew}: all steps would get what the first one draws"
            hint = "use torch.rand or dropout, or make it an input of the model"
            raise CaptureError(problem, lines.get((drew, own)) or "forward", hint) from None


def _frozen(state: Any) -> bytes:
    """The state of a generator; a tensor is pickled otherwise each time."""
    return pickle.dumps(bytes(state.tolist()) if isinstance(state, torch.Tensor) else state)


@contextmanager
def _noting_lines(lines: dict[tuple[str, int], str]) -> Iterator[None]:
    """Note which threads call the functions of `random` and `numpy.random` (a library, such as Ray, draws names while
    we capture), and the first line of the user's that does: by kind and thread."""

    def noting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if (kind, threading.get_ident()) not in lines:
                lines[kind, threading.get_ident()] = running_line()
            return function(*args, **kwargs)

        return called

    numpys = getattr(sys.modules.get("numpy"), "random", None)
    drawing = ((PYTHONS, random, random.Random), (NUMPYS, numpys, getattr(numpys, "RandomState", ())))
    with replaced(
        (space, name, noting(kind, found))
        for kind, space, drawer in drawing for name, found in list(vars(space or object).items())
        if name not in KEEPING and isinstance(getattr(found, "__self__", None), drawer)
    ):  # fmt: skip
        yield


def _generators(module: torch.nn.Module) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Of every generator: its name, what reads its state, what puts a state back."""
    yield PYTHONS, random.getstate, random.setstate
    torchs = torch.default_generator
    yield (
        "torch's generator, past the keys", lambda: torchs.get_state().numpy().tobytes(),
        lambda state: torchs.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    )  # fmt: skip
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        yield NUMPYS, numpy.random.get_state, numpy.random.set_state
    own = {id(v): (f"{n}.{k}".lstrip("."), v) for n, m in module.named_modules() for k, v in vars(m).items()}
    for name, value in own.values():
        bits = getattr(value, "bit_generator", None) if type(value).__module__.startswith("numpy") else None
        if bits is not None:
            yield name, partial(getattr, bits, "state"), partial(setattr, bits, "state")
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            yield name, value.getstate, value.setstate
        elif isinstance(value, torch.Generator) or (numpy and isinstance(value, numpy.random.RandomState)):
            yield name, value.get_state, value.set_state


class CalledWith(TorchFunctionMode):
    """Notes each function that is called, and the numbers that it is called with.

    `expected`: what an earlier run noted; `where` is then the first line that calls with something else, and `change`
    says what. `follows`: tensors are told apart by where they come from.
    """

    def __init__(self, expected: Sequence[object] | None = None, *, follows: bool = False) -> None:
        super().__init__()
        self.expected, self.follows = expected, follows
        self.where = self.change = ""
        self.noted: list[tuple[object, ...]] = []
        self._alive: list[torch.Tensor] = []  # no other tensor gets the address of one that was seen
        self._turns: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = trees.tree_leaves((args, kwargs or {}))
        call = (getattr(func, "__name__", ""), *map(constant_of, given))
        if self.follows:
            call += torch.is_grad_enabled(), *(self._turn(v) for v in given if isinstance(v, torch.Tensor))
        if self.expected is not None and not self.where:
            index = len(self.noted)
            was = self.expected[index] if index < len(self.expected) else ()
            if was != call:
                self.where, self.change = running_line(), _change(was, call)
        self.noted.append(call)
        made = func(*args, **(kwargs or {}))
        if call[0] in EMPTY and type(made) is torch.Tensor:  # memory as it was found tells runs apart
            made.zero_()
        if self.follows:
            self.number(trees.tree_leaves(made))
        return made

    def number(self, values: Sequence[object]) -> None:
        """Tell these tensors apart by their turn."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self._turn(value)

    def require_end(self, where: str) -> None:
        """A run that stops early is another one too."""
        if self.expected is not None and not self.where and len(self.noted) < len(self.expected):
            self.where, self.change = where, _change(self.expected[len(self.noted)], ())

    @contextmanager
    def twice(self, run: Callable[[], object]) -> Iterator[None]:
        """Refuse that `run`, which the block does once, calls something else the second time: torch runs what is
        checkpointed again. Only where forwards are compared as wholes: tensors of a second run come from elsewhere."""
        drawing: list[Any] = [mode for mode in _get_current_function_mode_stack() if hasattr(mode, "calls")]
        start, before = len(self.noted), [mode.calls for mode in drawing]
        yield
        if self.expected is None or self.follows:
            return
        first, end, after = self.noted[start:], len(self.noted), [mode.calls for mode in drawing]
        held = self.expected, self.where, self.change
        self.expected = None
        for mode, calls in zip(drawing, before, strict=True):  # what it draws has the same keys
            mode.calls = calls
        run()
        second, (self.expected, self.where, self.change) = self.noted[end:], held
        del self.noted[end:]
        for mode, calls in zip(drawing, after, strict=True):
            mode.calls = calls
        places = range(len(first) - len(second) + 1)  # around it torch's own code calls more
        if not any(first[place : place + len(second)] == second for place in places):
            problem = "what is checkpointed computes with another number the second time, as torch runs it"
            raise CaptureError(
                problem, running_line(), "make what it counts an input, or leave the checkpoint out"
            )

    def _turn(self, value: torch.Tensor) -> int:
        if id(value) not in self._turns:
            self._turns[id(value)] = len(self._turns)
            self._alive.append(value)
        return self._turns[id(value)]


def _change(was: Any, now: Sequence[object]) -> str:
    if not was or not now or was[0] != now[0]:
        return f"it calls {now[0] if now else 'nothing more'} where it called {was[0] if was else 'nothing more'}"
    pairs = [(a, b) for a, b in zip(was, now, strict=False) if a != b]
    if pairs and all(isinstance(each, str) for each in pairs[0]):
        return f"it calls {now[0]} with {pairs[0][1]}, and did with {pairs[0][0]}"
    return f"it calls {now[0]} with other tensors"


def constant_of(value: object) -> object:
    """What of an argument must be equal: a number, the bytes of a constant, the shape of what is given."""
    if isinstance(value, NUMBERS):
        return repr(value)
    if not isinstance(value, torch.Tensor):
        return repr(value) if type(value).__module__ == "numpy" else type(value).__name__
    is_plain = type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu"
    if not is_plain or value.is_quantized or is_functorch_wrapped_tensor(value):
        return tuple(value.shape)
    with _disable_current_modes():
        raw: Any = (
            value.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy()
        )
        return tuple(value.shape), str(value.dtype), hashlib.blake2b(raw, digest_size=16).hexdigest()


def operations_of(traced: torch.fx.GraphModule) -> list[str]:
    """The graph's operations as text: equal where the same is computed from the same places and constants."""
    number = {node: index for index, node in enumerate(traced.graph.nodes)}
    lines = []
    for node in traced.graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        held: object = node.target if node.op != "placeholder" else ""
        if node.op == "get_attr":
            held = constant_of(getattr(traced, str(node.target)))
        lines.append(f"{node.op} {held} {args}")
    return lines
