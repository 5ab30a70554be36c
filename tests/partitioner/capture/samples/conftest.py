"""What tests of split batches share: all parts run node by node beside the whole, and every value held against it.

`check(forward, batch)` captures the parts of a batch, runs them together on real numbers, and checks by definition that
each value spreads as is said of it (`spread.py`), and that loss, gradients and buffers are those of eager torch.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils import _pytree as trees

from partitioner.capture.batch_inputs import tensors_of
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY, keyed_random
from partitioner.capture.forwards.step_loss import scalar_loss
from partitioner.capture.samples import loss_form
from partitioner.capture.samples.batch_cut import cut_batch
from partitioner.capture.samples.loss_form import LossForm
from partitioner.capture.samples.split_samples import Splitter
from partitioner.capture.samples.spread import Position, Same, Split, Total, place_of
from partitioner.capture.tracing import Captured, trace_module

own = torch.ops.orchestrate
Forward = Callable[..., torch.Tensor]
Batch = Mapping[str, Any]
NUMBER = 3  # the key of random numbers


class Model(nn.Module):
    """A layer, a table and two buffers, with any forward: `forward(model, **batch)`."""

    def __init__(self, forward: Forward, make: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lin, self.table = nn.Linear(4, 4).double(), nn.Embedding(6, 4).double()
            self.made = make()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))
        self.script = forward

    def forward(self, **batch: Any) -> torch.Tensor:
        return self.script(self, **batch)


@dataclass
class Parted:
    """A batch's parts as they are captured, and what was found out about them."""

    captured: Captured
    form: LossForm
    cut: frozenset[str]
    splitter: Splitter
    number: int

    def targets(self) -> list[str]:
        """The operators of a part."""
        return [str(n.target) for n in self.captured.graph_module.graph.nodes if n.op == "call_function"]


def capture_parts(module: nn.Module, batch: Batch, dp: int, microbatches: int) -> Parted:
    found: list[Splitter] = []

    class Remembered(Splitter):
        def run(self) -> None:
            found.append(self)
            super().run()

    def trace(given: Batch, mode: FakeTensorMode) -> Captured:
        return trace_module(module, given, None, fake_mode=mode)

    with patch.object(loss_form, "Splitter", Remembered):
        captured, form, cut = cut_batch(trace, batch, dp, microbatches, norms_per_part=False)
    return Parted(captured, form, cut, found[-1], dp * microbatches)


def together(node: Node, values: list[Any]) -> list[Any] | None:
    """What an operator between parts gives each of them."""
    if node.target in (own.sum_parts.default, own.known_total.default, own.final_total.default):
        return [sum(values[1:], values[0])] * len(values)
    if node.target is own.gather_parts.default:
        _, dim, outer, parts = node.args
        assert parts == len(values)
        return [
            torch.cat([v.unflatten(dim, (outer, -1)) for v in values], dim + 1).flatten(dim, dim + 1)
        ] * parts
    return None


def run_together(graph: torch.fx.Graph, inputs: list[list[torch.Tensor]]) -> dict[Node, list[Any]]:
    """Every node's value in every part. `inputs`: of each placeholder, by part."""
    values: dict[Node, list[Any]] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "call_function":
            number = len(inputs[0])
            made = (
                together(node, values[node.args[0]]) if str(node.target).startswith("orchestrate") else None
            )
            values[node] = made or [run_node(node, values, part) for part in range(number)]
    return values


def run_node(node: Node, values: Mapping[Node, list[Any]], part: int) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n][part])
    with ExitStack() as modes:
        if node.meta.get("no_grad"):
            modes.enter_context(torch.no_grad())
        if autocast := node.meta.get("autocast"):
            modes.enter_context(torch.autocast(*autocast, cache_enabled=False))
        return node.target(*args, **kwargs)


def inputs_of(parted: Parted, module: nn.Module, batch: Batch, parts: int) -> list[list[torch.Tensor]]:
    """Of each placeholder, what every one of `parts` is given."""
    registered = {f"params:{k}": v for k, v in module.named_parameters()}
    registered |= {f"buffers:{k}": v for k, v in module.named_buffers()}
    tensors, found = tensors_of(batch), []
    samples = parted.splitter.parts.samples
    for name in parted.captured.names.values():
        space, _, entry = name.partition(":")
        if space != "batch":
            found.append([registered[name]] * parts)
        elif entry in parted.cut:
            found.append(list(tensors[entry].chunk(parts)))
        elif entry == FIRST_SAMPLE:
            found.append([torch.tensor(part * samples) for part in range(parts)])
        else:
            found.append([torch.tensor(NUMBER) if entry == KEY else tensors[entry]] * parts)
    return found


def require_spread(spread: Any, parts: list[Any], whole: Any, samples: int, about: str) -> None:
    """The definition of `spread`, for the values of the parts and of the whole."""
    if isinstance(whole, tuple | list):
        spreads = spread if isinstance(spread, tuple) else (spread,) * len(whole)
        for index, (each, value) in enumerate(zip(spreads, whole, strict=True)):
            require_spread(each, [part[index] for part in parts], value, samples, f"{about}[{index}]")
        return
    match spread:
        case Same():
            made = parts
        case Total():
            made = [sum(parts[1:], parts[0])]
        case Split():
            place = place_of(spread, tuple(whole.shape), samples)
            assert place is not None, about
            outer, rest = divmod(whole.shape[place.dim], place.inner * samples)
            assert not rest, f"{about}: samples reach over more than dim {place.dim}"
            cut = [part.unflatten(place.dim, (outer, -1)) for part in parts]
            made = [torch.cat(cut, place.dim + 1).flatten(place.dim, place.dim + 1)]
        case Position(weight):
            assert all(torch.equal(part, parts[0]) for part in parts), about
            made = (
                [whole]
                if weight == whole.numel() // len(whole) and len(parts[0]) * len(parts) == len(whole)
                else []
            )
    for value in made:
        assert value.shape == whole.shape, f"{about}: {value.shape}, the whole has {whole.shape}"
        torch.testing.assert_close(value, whole, msg=lambda m: f"{about}: {m}", equal_nan=True)
    assert made, about


def loss_of_parts(parted: Parted, values: Mapping[Node, list[Any]]) -> torch.Tensor:
    form = parted.form
    if form.tail:
        return values[form.total][0]
    total = sum(values[form.total][1:], values[form.total][0])
    return total if form.count is None else total / sum(values[form.count][1:], values[form.count][0])


def gradients(loss: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    return found


def check_parts(
    forward: Forward, batch: Batch, dp: int = 2, microbatches: int = 2, *, keyed: bool = False,
    make: Callable[[], nn.Module] = nn.Identity,
) -> Parted:  # fmt: skip
    """Hold every value, the loss, its gradients and new buffers against one chip. `make`: a further layer."""
    module, plain = Model(forward, make), Model(forward, make)
    parted = capture_parts(module, batch, dp, microbatches)
    splitter, graph = parted.splitter, parted.captured.graph_module.graph
    samples = splitter.parts.samples * parted.number
    values = run_together(graph, inputs_of(parted, module, batch, parted.number))
    wholes = run_together(splitter.whole, inputs_of(parted, module, batch, 1))
    for node in values:
        is_told = node in splitter.spreads and node not in splitter.instead
        if is_told and node.op != "placeholder" and "empty" not in str(node.target):
            whole = wholes[splitter.wholes[node]][0]
            require_spread(splitter.spreads[node], values[node], whole, samples, node.format_node() or "")
    loss = loss_of_parts(parted, values)
    inputs = trees.tree_map_only(torch.Tensor, torch.Tensor.clone, dict(batch))
    with keyed_random(torch.tensor(NUMBER), torch.tensor(0)) if keyed else nullcontext():
        expected = scalar_loss(plain(**inputs))
    torch.testing.assert_close(loss, expected)
    for (name, mine), theirs in zip(
        gradients(loss, module).items(), gradients(expected, plain).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=lambda m, name=name: f"gradient of {name}: {m}")
    require_buffers(parted, values, module, plain)
    return parted


def require_buffers(
    parted: Parted, values: Mapping[Node, list[Any]], module: nn.Module, plain: nn.Module
) -> None:
    """Buffers that change hold in every part what they hold on one chip."""
    results = next(iter(reversed(parted.captured.graph_module.graph.nodes))).args[0]
    updated = parted.captured.updated
    after = dict(zip(updated, results[len(results) - len(updated) :], strict=True))
    for name, value in plain.named_buffers():
        for mine in values[after[name]] if name in after else [module.get_buffer(name)]:
            torch.testing.assert_close(mine, value)


@pytest.fixture(scope="session")
def check(one_thread: None) -> Callable[..., Parted]:
    """`check(forward, batch, dp=2, microbatches=2)`: see `check_parts`."""
    return check_parts


@pytest.fixture(scope="session")
def parts_of(one_thread: None) -> Callable[..., Parted]:
    """`parts_of(forward, batch, dp, microbatches)`: captured only, for what is refused."""
    return lambda forward, batch, dp=2, microbatches=2: capture_parts(Model(forward), batch, dp, microbatches)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="session", name="doubles")
def maker() -> Callable[..., torch.Tensor]:
    return doubles


@pytest.fixture
def sequences() -> dict[str, torch.Tensor]:
    """Eight samples of three vectors of four."""
    return {"x": doubles(8, 3, 4)}
