"""Random models, trained by random plans: each run equals a plain PyTorch loop, or is refused. Anything else is a bug.

A case is `support/random_training.py`'s. Compared are the losses of all steps, parameters and buffers after `sync()`,
and the parameters after one more plain step, which shows that the optimizer's states came back. Refusals have to name a
line of the user's, and a hint. Cases that the plain loop cannot run, whose values are not finite or too sensitive to
rounding to be told apart, are skipped.

    cd benchmarks; python -m exactness.equal_training [--cases 300] [--seed 0] [--first 0] [--jobs 2] [--show SEED]
"""

import argparse
import copy
import linecache
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from support.harness import report
from support.random_python import FUNCTIONS
from support.random_steps import OWN
from support.random_training import Case, random_case
from torch import nn

from comms.errors import has_line
from orchestrator.exceptions import UserError
from orchestrator.runs.data import step_key
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.library_forms import keyed_draws

TOLERANCE = 1e-9
FLOOR = 0.1  # smaller numbers are compared with this one: a gradient of nothing but rounding is no difference
ROUNDING, AMPLIFIED = 1e-14, 100.0  # a plain run moved by so much may differ by a part of what ours does
SEEDS_APART = 1_000_000
# A cast to fewer digits rounds what chips hold: gradients of a sum, divided later, where plain torch has a mean's.
NARROWER, NARROW_ROUNDING = (".float()", "float32", ".half()", "bfloat16"), 1e-9
MOVED_RUNS = 8  # one may by chance leave the sign of a gradient of nothing but rounding as it is
POOL = 400  # cases of one set of processes, whose memory grows
C = 4  # features
PRELUDE = """
import torch
from types import SimpleNamespace
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
C = 4
CW = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
"""


class Named(NamedTuple):
    """A part of a batch."""

    k: float
    t: torch.Tensor


class Outcome(StrEnum):
    """How a case ended."""

    EQUAL = "equal"
    REFUSED = "refused"
    UNPLACED = "UNPLACED"  # refused without a line of the user's, or without a hint
    DIFFERS = "DIFFERS"
    CRASH = "CRASH"
    SKIPPED = "skipped"


WRONG = (Outcome.UNPLACED, Outcome.DIFFERS, Outcome.CRASH)


@dataclass(frozen=True, slots=True)
class Ended:
    """A case that ran, and what there is to say of it."""

    case: Case
    outcome: Outcome
    what: str = ""


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses of all steps, then values by name: after the last step, and after one more plain step."""

    losses: list[float]
    values: dict[str, torch.Tensor]
    later: dict[str, torch.Tensor]


def main() -> None:
    """Run cases, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case's number")
    parser.add_argument("--show", type=int, help="print this case in full, and how it ends")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    settle()
    if options.show is not None:
        show(random_case(options.show))
        return
    ended = []
    start = options.seed * SEEDS_APART + options.first
    numbers = range(start, start + options.cases)
    for some in (numbers[at : at + POOL] for at in range(0, len(numbers), POOL)):
        with ProcessPoolExecutor(options.jobs, get_context("spawn"), settle) as pool:
            for one in pool.map(ended_by_number, some):
                ended.append(one)
                if one.outcome in WRONG:
                    print(f"{one.outcome} {one.case}\n    {one.what}", flush=True)
    counted = [one for one in ended if one.outcome != Outcome.SKIPPED]
    refusals = Counter(one.what.split("\n")[0] for one in counted if one.outcome == Outcome.REFUSED)
    for message, times in refusals.most_common(40):
        print(f"{times:4} refused: {message}")
    report("equal_training", rows_of(counted))


def settle() -> None:
    """What every process begins with."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def ended_by_number(number: int) -> Ended:
    """A case, by the integer that it is drawn from."""
    return ended_as(random_case(number))


def show(case: Case) -> None:
    """A case in full."""
    one = ended_as(case, print_traceback=True)
    print(f"{case}\n\n{case.source}\n{one.outcome}: {one.what}")


def rows_of(ended: list[Ended]) -> list[Mapping[str, object]]:
    """A row per kind of plan."""
    kinds: dict[str, Callable[[Case], bool]] = {
        "all": lambda case: True,
        "one chip": lambda case: case.plan.num_chips == 1 and case.plan.microbatches == 1,
        "dp": lambda case: case.plan.dp > 1,
        "tp": lambda case: case.plan.tp > 1,
        "pp": lambda case: case.plan.pp > 1,
        "zero 1": lambda case: case.plan.zero == 1 and case.plan.dp > 1,
        "microbatches": lambda case: case.plan.microbatches > 1,
        "loss_fn": lambda case: bool(case.takes),
    }
    rows: list[Mapping[str, object]] = []
    for kind, fits in kinds.items():
        found = Counter(one.outcome for one in ended if fits(one.case))
        counts = {str(o): found[o] for o in Outcome if o != Outcome.SKIPPED}
        share = found[Outcome.EQUAL] / max(found.total(), 1)
        rows.append({"plans": kind, "cases": found.total(), **counts, "equal_share": share})
    return rows


def names_of(case: Case) -> dict[str, Any]:
    """The names that the text defines; tracebacks show its lines."""
    names: dict[str, Any] = {"__name__": "random_case"}
    for title, text in (("prelude", PRELUDE + FUNCTIONS + OWN), (f"case {case.seed}", case.source)):
        linecache.cache[title] = (len(text), None, text.splitlines(keepends=True), title)
        exec(compile(text, title, "exec"), names)
    return names


def batch_of(case: Case, step: int) -> dict[str, Any]:
    """The inputs of a step."""
    size, time = case.sizes[step]
    generator = torch.Generator().manual_seed(case.seed * 8 + step)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape, own_time = case.target
    rows = (size,) if shape == "v" else (size, own_time or time)
    labels = torch.randint(0, C, rows, generator=generator)
    if case.seed % 2 and "ignore_index=0" not in case.loss:
        labels[normal(*rows) > 0.7] = -100
    weights = normal(*rows).abs() + 0.1
    lengths = torch.randint(1, time + 1, (size, 1), generator=generator)
    pixels = torch.randint(0, 9, (size, 2, time, 3), generator=generator)
    is_whole = any("pix.to" in run for _, run in case.pieces)
    known = {
        "x0": normal(size, time, C), "v0": normal(size, C), "tgt": normal(*rows, C), "lab": labels,
        "ids": torch.randint(0, 9, (size, time), generator=generator), "msk": torch.arange(time) < lengths,
        "wgt": weights if case.seed % 3 else weights.round() + 0.0 * weights, "pos0": torch.arange(time),
        "pos1": torch.arange(time)[None], "gain": torch.tensor(1.0 + step, dtype=torch.float64), "absent": None,
        "temp": 1.0 + 0.5 * step, "cfg": {"a": normal(size, time, C), "b": [normal(C), 2.0]},
        "strided": normal(size, C, time).transpose(1, 2), "spread": normal(size, 1, C).expand(-1, time, -1),
        "pix": pixels if is_whole else pixels.double(), "flag": step % 2 == 0, "mode": "ab"[step % 2],
        "half": normal(size, C).float(), "wish": normal(size, C).requires_grad_(),
        "deep": {"p": (normal(size, C), {"q": [None, normal(C)]}), "r": Named(0.5, normal(size))},
    }  # fmt: skip
    return {name: known[name] for name in case.inputs}


def ended_as(case: Case, *, print_traceback: bool = False) -> Ended:
    """Train both ways, and compare."""
    try:
        plain = trained_plainly(case, *begun(case))
    except Exception as error:
        return Ended(case, Outcome.SKIPPED, f"{type(error).__name__}: {error}")
    numbers = [
        *plain.losses,
        *(v.double().abs().sum().item() for v in (*plain.values.values(), *plain.later.values())),
    ]
    if not all(map(math.isfinite, numbers)):
        return Ended(case, Outcome.SKIPPED, "not finite")
    names, module = begun(case)
    try:
        ours = trained_by_plan(case, names, module)
    except UserError as error:
        if not all(type(p) is nn.Parameter for p in module.parameters()):
            return Ended(case, Outcome.DIFFERS, "weights are spoilt")
        is_placed = has_line(error.where) and error.hint
        return Ended(case, Outcome.REFUSED if is_placed else Outcome.UNPLACED, str(error))
    except Exception as error:
        if print_traceback:
            traceback.print_exc()
        return Ended(case, Outcome.CRASH, f"{type(error).__name__}: {str(error)[:300]}")
    worst, where = difference(ours, plain)
    if worst <= TOLERANCE:
        return Ended(case, Outcome.EQUAL)
    by = NARROW_ROUNDING if any(word in case.source for word in NARROWER) else ROUNDING
    runs = (trained_plainly(case, *moved(by, turn, *begun(case))) for turn in range(MOVED_RUNS))
    if any(worst <= AMPLIFIED * difference(run, plain)[0] for run in runs):
        return Ended(case, Outcome.SKIPPED, "too sensitive to rounding")
    return Ended(case, Outcome.DIFFERS, f"{where} by {worst:.1e}; losses {ours.losses}, right {plain.losses}")


def begun(case: Case) -> tuple[dict[str, Any], nn.Module]:
    """The names and the module, made anew: no run sees what another one changed in them."""
    names = names_of(case)
    torch.manual_seed(case.seed)
    return names, names["M"]().double()


def moved(by: float, turn: int, names: dict[str, Any], other: nn.Module) -> tuple[dict[str, Any], nn.Module]:
    """The module with weights and gradients off by about a rounding, each turn by another one."""
    torch.manual_seed(turn)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1 + by * torch.randn(param.shape, dtype=param.dtype))
            if param.requires_grad:  # a gradient that cancels to zero has the sign of its rounding
                param.register_hook(lambda g: g + by * g.abs().max() * torch.randn(g.shape, dtype=g.dtype))
    return names, other


def difference(ours: Trained, plain: Trained) -> tuple[float, str]:
    """The largest relative difference, and where it is."""
    losses = enumerate(zip(ours.losses, plain.losses, strict=True))
    found = [(abs(a - b) / max(abs(b), FLOOR), f"loss {k}") for k, (a, b) in losses]
    for when, mine, others in (("", ours.values, plain.values), (" a step later", ours.later, plain.later)):
        for name, other in others.items():
            apart = (mine[name].double() - other.double()).norm() / max(other.double().norm().item(), FLOOR)
            found.append((apart.item(), name + when))
    return max(((d if math.isfinite(d) else math.inf), where) for d, where in found)


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def keyed(step: int) -> AbstractContextManager[None]:
    """Random numbers of a step are drawn by its key, as on chips."""
    return keyed_draws(torch.tensor(step_key(0, step)), torch.tensor(0))


def loss_of(
    case: Case, names: Mapping[str, Any], module: nn.Module, batch: Mapping[str, Any]
) -> torch.Tensor:
    """The loss, as a plain loop computes it."""
    output: Any = module(**batch)
    if case.takes:
        loss_fn = names["loss_fn"]
        output = loss_fn(output, batch) if case.takes == "output, batch" else loss_fn(output, **batch)
    elif isinstance(output, dict):
        output = output["loss"]
    elif isinstance(output, tuple):
        output = output[0]
    loss: torch.Tensor = output if isinstance(output, torch.Tensor) else output.loss
    return loss


def plain_step(
    case: Case, names: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any],
    number: int,
) -> float:  # fmt: skip
    """Step `number` of a plain loop."""
    optimizer.zero_grad()
    with keyed(number):
        loss = loss_of(case, names, module, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if case.clip_norm:
        nn.utils.clip_grad_norm_(module.parameters(), case.clip_norm)
    optimizer.step()
    return loss.item()


def trained_plainly(case: Case, names: Mapping[str, Any], module: nn.Module) -> Trained:
    """The plain loop."""
    scope = dict(names) | {"m": module}
    optimizer = scope["o"] = eval(case.optimizer, scope)
    schedule = eval(case.schedule, scope) if case.schedule else None
    losses: list[float] = []
    for k in range(len(case.sizes)):
        batch = batch_of(case, k)

        def evaluate(batch: Mapping[str, Any] = batch, step: int = k) -> None:
            with torch.no_grad(), keyed(step):
                losses.append(loss_of(case, names, copy.deepcopy(module), batch).item())

        exec(case.hooks[k], scope | {"k": k, "sync": lambda: None, "evaluate": evaluate})
        losses.append(plain_step(case, names, module, optimizer, batch, k))
        if schedule:
            schedule.step()
    values = values_of(module)
    plain_step(case, names, module, optimizer, batch_of(case, 0), len(case.sizes))
    return Trained(losses, values, values_of(module))


def trained_by_plan(case: Case, names: Mapping[str, Any], module: nn.Module) -> Trained:
    """The same through `distribute`."""
    scope = dict(names) | {"m": module}
    optimizer = scope["o"] = eval(case.optimizer, scope)
    schedule = eval(case.schedule, scope) if case.schedule else None
    step = distribute(
        module, optimizer, "laptop", plan=case.plan, chips=case.plan.num_chips, loss_fn=names.get("loss_fn"),
        clip_norm=case.clip_norm,
    )  # fmt: skip
    losses: list[float] = []
    for k in range(len(case.sizes)):
        batch = batch_of(case, k)

        def evaluate(batch: Mapping[str, Any] = batch) -> None:
            losses.append(step.evaluate(batch))

        exec(case.hooks[k], scope | {"k": k, "sync": step.sync, "evaluate": evaluate})
        losses.append(step(batch))
        if schedule:
            schedule.step()
    step.sync()
    values = values_of(module)
    plain_step(case, names, module, optimizer, batch_of(case, 0), len(case.sizes))
    return Trained(losses, values, values_of(module))


if __name__ == "__main__":
    main()
