"""Questions about autograd that a forward asks, and what it does to autograd: as in training, or refused.

Stand-ins of trained parameters require gradients, and autograd records a trace as it would training: questions about
values (`requires_grad`, `grad_fn`, `is_leaf`) get true answers by themselves. The wrappers of functionalization know
less, so a functional trace is told again what the plain one of the same forward was told, in the same order.
`inference_mode` is as `no_grad`, which a trace sees. What stays refused: changing what requires a gradient, and
questions in a reentrant checkpoint, which torch runs twice with different answers.
"""

import sys
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from comms.errors import CaptureError
from partitioner.capture.captured_graph import constants_of
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.pure_graph import with_gradient
from partitioner.capture.source_lines import running_line, source_line
from partitioner.capture.type_questions import READER, AskedNode

original = nn.Module.__setattr__
Answer = tuple[str, object]
QUESTIONS = {
    getattr(torch._C.TensorBase, name): name
    for name in ("requires_grad", "grad_fn", "is_leaf", "is_inference")
}
MEMORY = (torch._C.TensorBase._version, torch._C.TensorBase.data_ptr)  # which is not that of training
TRACING = (
    "torch._",
    "torch.fx",
    "torch.utils._",
)  # torch's own machinery, which asks in one kind of trace only
OWN = ("torch.", "partitioner.", "transformers.")
ASKED_TWICE = "inside a reentrant checkpoint, where the answer is another one when it is computed again"


class AutogradQuestions(TorchFunctionMode):
    """Notes the answers of a plain trace; with `told`, those of an earlier trace, it gives these.

    `registered`: what the module registers, by the identity of its stand-ins; `modules`: it and those inside it.
    """

    def __init__(
        self,
        registered: Mapping[int, str],
        modules: Collection[nn.Module],
        fake_mode: FakeTensorMode,
        told: Sequence[Answer] | None = None,
    ) -> None:
        super().__init__()
        self.registered, self.modules, self.fake_mode, self.told = registered, modules, fake_mode, told
        self.answers: list[Answer] = []
        self.num_reentrant = 0  # how many reentrant checkpoints it is inside
        self.inference: list[
            tuple[bool, bool]
        ] = []  # of open modes: whether on, whether gradients were on before
        self.infers = False  # whether there was one

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        descriptor = getattr(func, "__self__", None) or func
        if descriptor in MEMORY and not _asking_module().startswith(OWN):
            raise CaptureError("the forward asks for the memory of a tensor", running_line(),
                               "leave _version and data_ptr() to torch")  # fmt: skip
        attribute = QUESTIONS.get(descriptor, "")
        if attribute and name != "__set__":
            return self._answer(attribute, args[0], func)
        if attribute == "requires_grad" or func in (torch.Tensor.requires_grad_, torch.Tensor.detach_):
            flag = False if name == "detach_" else (*args, *(kwargs or {}).values(), True)[1]
            self._require_unchanged(args[0], bool(flag))
        return func(*args, **(kwargs or {}))

    def _answer(self, question: str, value: torch.Tensor, ask: Callable[..., Any]) -> Any:
        asking = _asking_module()
        if asking.startswith(TRACING):
            return ask(value)
        is_own = asking.startswith(OWN)
        if question == "is_inference" and self.infers and not is_own:
            raise CaptureError("the forward asks is_inference() after inference_mode", running_line(),
                               "ask requires_grad")  # fmt: skip
        if self.num_reentrant and not is_own and id(value) not in self.registered:
            raise CaptureError(f"the forward asks for {question} {ASKED_TWICE}", running_line(),
                               "use checkpoint(..., use_reentrant=False)")  # fmt: skip
        if self.told is None:
            is_real = type(value) is torch.Tensor  # made of numbers; what is written into it, its fake knows
            self.answers.append((question, ask(self.fake_mode.from_tensor(value) if is_real else value)))
        elif len(self.answers) < len(self.told) and self.told[len(self.answers)][0] == question:
            self.answers.append(self.told[len(self.answers)])
        else:
            raise CaptureError(f"the forward asks for {question} another time than before", running_line(),
                               "let each forward ask the same")  # fmt: skip
        answer = self.answers[-1][1]
        return AskedNode(answer) if isinstance(answer, Node) and not is_own else answer

    def _require_unchanged(self, value: torch.Tensor, flag: bool) -> None:
        """Refuse to change what of the model, or of other modules, is trained."""
        place = self.registered.get(id(value), "")
        if not place and type(value) is nn.Parameter:
            place = "params:of another module"
        if self.told is not None or not place or value.requires_grad == flag:
            return
        space, _, name = place.partition(":")
        kind = {"params": "parameter", "buffers": "buffer"}[space]
        raise CaptureError(f"the forward sets requires_grad of the {kind} {name}", running_line(),
                           "set it before training; inside, use detach() or no_grad")  # fmt: skip

    @contextmanager
    def computed_again(self, is_reentrant: bool) -> Iterator[None]:
        """Inside a checkpoint, which gives other answers in the backward if it is a reentrant one."""
        self.num_reentrant += is_reentrant
        try:
            yield
        finally:
            self.num_reentrant -= is_reentrant

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While a forward runs: it may ask, and `inference_mode` is seen."""

        def enter(mode: torch.inference_mode) -> None:
            self.inference.append((mode.mode, torch.is_grad_enabled()))
            self.infers = self.infers or mode.mode
            torch._C._set_grad_enabled(not mode.mode)

        def leave(*_: object) -> None:
            torch._C._set_grad_enabled(self.inference.pop()[1])

        answers: list[tuple[Any, str, Callable[..., object]]] = [
            (torch.inference_mode, "__enter__", enter),
            (torch.inference_mode, "__exit__", leave),
            (torch, "is_inference_mode_enabled", lambda: bool(self.inference and self.inference[-1][0])),
            (torch, "is_grad_enabled", self._is_grad_enabled),
            # a fake that was written requires gradients
            (meta_utils, "assert_metadata_eq", lambda *_, **__: None),
            (nn.Module, "__setattr__", lambda *given: self._set(*given)),
        ]
        with replaced(answers), self:
            yield

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Modules of the loss, or that the model does not register, are not borrowed: no step could change them."""
        is_foreign = module not in self.modules and isinstance(value, torch.Tensor)
        if is_foreign and isinstance(getattr(module, name, None), torch.Tensor):
            problem = f"{name} of {type(module).__name__} changes, which is no part of the model"
            raise CaptureError(problem, running_line(), "make it a buffer of the model")
        original(module, name, value)

    def _is_grad_enabled(self) -> bool:
        if self.num_reentrant and not str(sys._getframe(1).f_globals.get("__name__")).startswith(OWN):
            raise CaptureError(f"the forward asks is_grad_enabled {ASKED_TWICE}", running_line(),
                               "use checkpoint(..., use_reentrant=False)")  # fmt: skip
        return torch._C.is_grad_enabled()


def _asking_module() -> str:
    """The name of the module whose code asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (
        frame.f_code.co_name in ("__torch_function__", READER) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")) if frame else ""


def require_own(traced: torch.fx.GraphModule, registered: Container[int]) -> None:
    """Refuse tensors that are trained in plain torch, but are not the model's. `registered`: identities of those."""
    graph = traced.graph
    loss = next(iter(reversed(graph.nodes))).args[0][0]
    for node, value in constants_of(traced):
        if id(value) in registered or not value.requires_grad:
            continue
        if loss in with_gradient(graph, [node]):
            problem = f"a tensor of shape {tuple(value.shape)} is trained in plain PyTorch, but is no parameter here"
            place = source_line(next(iter(node.users), node))
            raise CaptureError(problem, place, "make it a parameter of the model")


def stand_in_for(source: torch.Tensor, value: torch.Tensor, is_parameter: bool) -> None:
    """Give a stand-in what code may ask of the tensor that it stands for: attributes, and whether it is a parameter."""
    for name, attribute in vars(source).items():
        if name not in vars(value):
            setattr(value, name, attribute)
    if is_parameter:
        value._is_param = True  # what torch.nn.Parameter's isinstance looks at
