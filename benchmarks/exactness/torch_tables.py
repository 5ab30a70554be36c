"""Operators and modules with arguments of torch's own test tables, trained by plans: as in plain torch, or refused.

Nobody here chose what the tables hold: some 600 operators and 140 modules, each with samples of all its arguments.
Dim 0 of the first tensor of numbers is taken for the samples, whatever it means to the operator; other tensors of as
many rows are entries of the batch or buffers. In front stand trained weights, behind a loss that is a sum, a mean, or
neither over samples. Compared are the losses and the parameters after two steps. Needs the package expecttest.

    cd benchmarks; python -m exactness.torch_tables [--table operators] [--part 0/2] [--samples 3] [--only add]
"""

import argparse
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from support.harness import report
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as trees

from comms.errors import has_line
from exactness.equal_training import FLOOR, TOLERANCE, WRONG, Outcome, keyed, settle
from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

PRECISION = torch.float64
STEPS = 2
LARGEST = 5_000  # entries of a tensor
PLANS = (
    Plan(), Plan(dp=2), Plan(microbatches=2), Plan(dp=2, microbatches=2), Plan(tp=2), Plan(pp=2),
    Plan(dp=2, zero=1),
)  # fmt: skip
LOSSES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean of squares": lambda value: value.square().mean(),
    "mean": lambda value: value.mean(),
    "sum": lambda value: value.tanh().sum(),
}
# Roundings to fewer digits cannot be compared to the last, and these take minutes.
LEFT_OUT = {"bfloat16", "half", "float", "cfloat", "chalf", "polygamma", "special.polygamma"}


@dataclass(frozen=True, slots=True)
class Called:
    """A call with a sample's arguments: `make` gives the function, or the module with it."""

    name: str
    make: Callable[[], Callable[..., Any]]
    leaves: list[Any]
    spec: Any
    first: int  # of the leaves: the tensor with the samples
    entries: frozenset[int]
    loss: str
    has_product: bool

    def __str__(self) -> str:
        shown = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in self.leaves]
        return f"{self.name} of {shown}, entries {sorted(self.entries)}, {self.loss}"


class Model(nn.Module):
    """Weights, the call, and a loss."""

    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called, self.function = called, called.make()
        shape = called.leaves[called.first].shape[1:]
        self.scale = nn.Parameter(torch.linspace(0.8, 1.2, shape.numel(), dtype=PRECISION).reshape(shape))
        if called.has_product:
            self.product = nn.Parameter(torch.eye(shape[-1], dtype=PRECISION) + 0.02)
        for place, leaf in enumerate(called.leaves):
            if isinstance(leaf, torch.Tensor) and place not in called.entries:
                self.register_buffer(f"held{place}", leaf.clone())

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        leaves = [
            batch.get(f"entry{i}", getattr(self, f"held{i}", v)) for i, v in enumerate(self.called.leaves)
        ]
        value = leaves[self.called.first] * self.scale
        leaves[self.called.first] = value @ self.product if self.called.has_product else value
        args, given = trees.tree_unflatten(leaves, self.called.spec)
        found = [v for v in trees.tree_leaves(self.function(*args, **given)) if isinstance(v, torch.Tensor)]
        numbers = [torch.view_as_real(v) if v.is_complex() else v for v in found if v.numel()]
        return torch.stack([LOSSES[self.called.loss](v) for v in numbers if v.is_floating_point()]).sum()


def main() -> None:
    """Run the samples of the tables, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=("operators", "modules"), default="operators")
    parser.add_argument("--part", default="0/1", help="0/2: every second one, from the first")
    parser.add_argument("--samples", type=int, default=3, help="of each")
    parser.add_argument("--only", help="the name of one")
    options = parser.parse_args()
    settle()
    part, parts = map(int, options.part.split("/"))
    infos: list[OpInfo | ModuleInfo] = list(op_db if options.table == "operators" else module_db)[part::parts]
    taken: Counter[tuple[str, Outcome]] = Counter()
    refusals: Counter[str] = Counter()
    for info in (i for i in infos if options.only in (None, i.name) and i.name not in LEFT_OUT):
        draw = random.Random(f"{info.name} {getattr(info, 'variant_test_name', '')}")
        for called in samples_of(info, draw, options.samples):
            for plan, outcome, said in outcomes(called, draw):
                taken["all", outcome] += 1
                taken[str(plan), outcome] += 1
                refusals[said.split("\n")[0][:120]] += outcome == Outcome.REFUSED
                if outcome in WRONG or options.only:
                    print(f"{outcome} {called} by {plan}\n    {said}", flush=True)
    for message, times in (+refusals).most_common(40):
        print(f"{times:4} refused: {message}")
    report(f"torch_{options.table}", [
        {"plan": plan, **{str(o): taken[plan, o] for o in Outcome if o != Outcome.SKIPPED}}
        for plan in dict.fromkeys(name for name, _ in taken)
    ])  # fmt: skip


def samples_of(info: OpInfo | ModuleInfo, draw: random.Random, most: int) -> Iterator[Called]:
    """Calls with some of an operator's or a module's samples, those of even numbers of rows first."""
    found = []
    for make, sample in _given(info):
        leaves, spec = trees.tree_flatten(sample)
        tensors = [v for v in leaves if isinstance(v, torch.Tensor)]
        rows = [i for i, v in enumerate(leaves) if _has_samples(v)]
        if rows and all(v.layout is torch.strided for v in tensors):
            found.append((make, leaves, spec, rows[0]))
    draw.shuffle(found)
    found.sort(key=lambda one: one[1][one[3]].shape[0] % 2)
    for make, leaves, spec, first in found[:most]:
        size = leaves[first].shape[0]
        others = [i for i, v in enumerate(leaves) if i > first and isinstance(v, torch.Tensor) and v.dim()]
        entries = {i for i in others if leaves[i].shape[0] == size and draw.random() < 0.6}
        width = leaves[first].shape[-1] if leaves[first].dim() > 1 else 1
        has_product = width % 2 == 0 and draw.random() < 0.7
        loss = draw.choice(list(LOSSES))
        yield Called(info.name, make, leaves, spec, first, frozenset({first} | entries), loss, has_product)


def _given(info: OpInfo | ModuleInfo) -> Iterator[tuple[Callable[[], Callable[..., Any]], Any]]:
    """What makes the function, and its arguments, sample by sample."""
    if isinstance(info, ModuleInfo):
        for sample in info.module_inputs_func(info, "cpu", PRECISION, requires_grad=False, training=True):
            if sample.forward_input is not None:
                made = sample.constructor_input
                yield (
                    lambda made=made: info.module_cls(*copy.deepcopy(made.args), **copy.deepcopy(made.kwargs)).double(),
                    (sample.forward_input.args, sample.forward_input.kwargs),
                )  # fmt: skip
    elif PRECISION in info.supported_dtypes("cpu") and info.supports_autograd:
        for sample in info.sample_inputs("cpu", PRECISION, requires_grad=False):
            yield lambda: info.op, ((sample.input, *sample.args), sample.kwargs)


def _has_samples(value: object) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim()
    return bool(is_tensor) and value.shape[0] > 1 and 0 < value.numel() < LARGEST  # type: ignore[attr-defined]


def outcomes(called: Called, draw: random.Random) -> Iterator[tuple[Plan, Outcome, str]]:
    """How a call ends by two plans; nothing where plain torch does not train it."""
    try:
        losses, weights = trained(called, None)
    except Exception:
        return
    if not torch.isfinite(torch.cat([losses, weights])).all():
        return
    rows = called.leaves[called.first].shape[0]
    fit = [p for p in PLANS if rows % (p.dp * p.microbatches) == 0 and (p.tp == 1 or called.has_product)]
    for plan in draw.sample(fit, 2):
        try:
            found = trained(called, plan)
        except UserError as error:
            is_placed = has_line(error.where) or error.where.startswith("batch")
            yield plan, Outcome.REFUSED if is_placed and error.hint else Outcome.UNPLACED, str(error)
        except Exception as error:
            yield plan, Outcome.CRASH, repr(error)
        else:
            far = max(map(_distance, found, (losses, weights)))
            yield plan, Outcome.EQUAL if far < TOLERANCE else Outcome.DIFFERS, f"by {far:.2g}"


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two sets of numbers, relative to the expected ones."""
    return float(((found - expected).abs() / expected.abs().clamp(min=FLOOR)).max())


def trained(called: Called, plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and all parameters and buffers after the last step; without a plan as a plain loop does it."""
    torch.manual_seed(0)
    model = Model(called)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = None if plan is None else distribute(model, optimizer, "laptop", plan=plan, chips=plan.num_chips)
    losses = []
    for number in range(STEPS):
        batch = {f"entry{i}": _moved(called.leaves[i], number) for i in sorted(called.entries)}
        if step is not None:
            losses.append(float(step(batch)))
            continue
        optimizer.zero_grad()
        with keyed(number):
            loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if step is not None:
        step.sync()
    held = [v.detach().reshape(-1) for v in (*model.parameters(), *model.buffers())]
    numbers = [torch.view_as_real(v).reshape(-1) if v.is_complex() else v for v in held]
    return torch.tensor(losses, dtype=PRECISION), torch.cat([v.to(PRECISION) for v in numbers])


def _moved(value: torch.Tensor, step: int) -> torch.Tensor:
    return value * (1 + 0.03 * step) if value.is_floating_point() or value.is_complex() else value.clone()


if __name__ == "__main__":
    main()
