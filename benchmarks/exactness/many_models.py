"""Models of many kinds as they are, with dropout: capture, then SGD steps by four plans, against the plain torch loop.

cd benchmarks; python -m exactness.many_models [--only llama] [--as-is]

Float64 is kept through the models' own casts unless --as-is says otherwise: else sums taken in another order differ by
float32's rounding. The plain loop draws random numbers by the same keys.
"""

import argparse
import contextlib
import logging
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from support.harness import report
from support.model_list import model_cases
from support.models.model_case import ModelCase
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exactness.equal_training import keyed
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import partition
from partitioner.program.program import Program

PLANS = {"one": Plan(), "dp2": Plan(dp=2), "pp2": Plan(pp=2, microbatches=2), "tp2": Plan(tp=2)}
SAMPLES, STEPS, RATE, SECONDS = 4, 2, 0.05, 300
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}
CAUSE = " for"
ADDRESS = re.compile(r"0x[0-9a-f]+")
SMALL = 1e-3  # of the largest change of any parameter: smaller ones are held against this
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "attention", "lstm", "gru")


def main() -> None:
    """Run and report: what becomes of every model, and for what causes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--as-is", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    rows, causes = [], []
    for case in model_cases():
        if not options.only or any(part in case.name for part in options.only):
            with contextlib.nullcontext() if options.as_is else ExactFloat64():
                found = row_of(case)
            rows.append({key: value for key, value in found.items() if not key.endswith(CAUSE)})
            causes += [
                (found[k[: -len(CAUSE)]], k[: -len(CAUSE)], why, case.name)
                for k, why in found.items()
                if k.endswith(CAUSE)
            ]
            print(found, flush=True)
    report("many_models", rows)
    report("many_models_causes", grouped(causes))
    for plan in PLANS:
        print(plan, dict(Counter(str(row.get(plan, "fails")) for row in rows)))


def grouped(causes: Sequence[tuple[Any, ...]]) -> list[dict[str, object]]:
    """Causes with the plans and models that they concern, the most frequent first."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for what, plan, why, name in causes:
        found.setdefault((what, ADDRESS.sub("...", why)), {}).setdefault(name, []).append(plan)
    rows = [
        {"outcome": what, "cause": why, "models": "; ".join(f"{n} ({' '.join(p)})" for n, p in names.items())}
        for (what, why), names in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return sorted(rows, key=lambda row: row["outcome"])


def row_of(case: ModelCase) -> dict[str, object]:
    """All that is found out about one model."""
    row: dict[str, object] = {"name": case.name, "kind": case.kind}
    try:
        with limited():
            expected = plain(case)
    except Exception as error:  # whatever the model raises
        return row | {"one": "fails", f"one{CAUSE}": said(error)}
    row |= captured(case)
    for name, plan in PLANS.items():
        row |= {
            f"{name}{key}": value for key, value in outcome(partial(by_plan, case, plan, expected)).items()
        }
    return row


def outcome(run: Callable[[], tuple[float, float]]) -> dict[str, object]:
    """What becomes of a run, which returns how far it is from the plain loop."""
    start, found = time.perf_counter(), {"": "equal"}
    try:
        with limited():
            far, close = run()
        if not far < close:
            found = {"": "DIFFERS", CAUSE: f"by {far:.1e}"}
    except UserError as error:
        found = {"": "refused", CAUSE: f"{said(error)} [{place(error)}]"}
    except Exception as error:  # a crash is what is looked for
        found = {"": "CRASH", CAUSE: f"{said(error)} [{place(error)}]"}
    return found | {" s": time.perf_counter() - start}


def captured(case: ModelCase) -> dict[str, object]:
    """How long capture and lowering take, whether the model stays what it was, and FLOPs."""
    model = case.make()
    before = kept(model)
    start = time.perf_counter()
    try:
        with limited():
            whole = partition(model, case.batch(SAMPLES), Plan())
    except Exception:  # the plans will say it
        return {"capture_s": time.perf_counter() - start, "same": same(model, before)}
    row: dict[str, object] = {"capture_s": time.perf_counter() - start, "same": same(model, before)}
    flops = products(whole)
    row["flops"] = flops / max(eager_flops(case), 1)
    with contextlib.suppress(Exception):
        row["tp share"] = products(partition(case.make(), case.batch(SAMPLES), Plan(tp=2))) / max(flops, 1)
    return row


def kept(model: nn.Module) -> tuple[Any, ...]:
    """What of a model must not change: which tensors it has, and their values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    marks = tuple((n, id(v), v.requires_grad, v.grad is None) for n, v in named)
    values = [v.detach().clone() for v in (*model.state_dict().values(), *(v for _, v in named))]
    return (
        marks,
        values,
        [m.training for m in model.modules()],
        {n: set(vars(m)) for n, m in model.named_modules()},
    )


def same(model: nn.Module, before: tuple[Any, ...]) -> bool:
    """Whether a model is what it was, to the bit."""
    now = kept(model)
    return now[0] == before[0] and now[2:] == before[2:] and all(map(equal_bits, now[1], before[1]))


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are the same, NaN and all."""
    return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def plain(case: ModelCase) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, start values and end values of a loop without us."""
    model = case.make()
    start = values_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    with call_through():
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = case.batch(SAMPLES)  # drawn by torch
            with keyed(step):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, start, values_of(model)


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {n: v.detach().clone() for n, v in (*model.named_parameters(), *model.named_buffers())}


@contextlib.contextmanager
def call_through() -> Iterator[None]:
    """Checkpointed blocks are called once, as a second time would draw other numbers."""

    def called(function: Callable[..., Any], *args: Any, use_reentrant: object = None, **more: Any) -> Any:  # noqa: ANN401
        return function(*args, **more)

    with patch.object(torch.utils.checkpoint, "checkpoint", called):
        yield


def by_plan(case: ModelCase, plan: Plan, expected: tuple[Any, ...]) -> tuple[float, float]:
    """How far losses and values are from those expected after the same steps, and how far they may be."""
    losses, start, end = expected
    model = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    cluster = load_cluster(cluster_path("laptop"))
    step = distribute(model, optimizer, cluster, plan=plan, chips=plan.num_chips)
    found = [step(case.batch(SAMPLES)) for _ in range(STEPS)]
    now = values_of(step.sync())
    far = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, losses, strict=True)]
    floats = [name for name, value in end.items() if value.is_floating_point()]
    changes = {name: float((end[name] - start[name]).abs().max()) for name in floats if end[name].numel()}
    scale = max(changes.values()) * SMALL
    far += [float((now[n] - end[n]).abs().max()) / max(changes[n], scale) for n in changes]
    far += [float(not torch.equal(now[n], end[n])) for n in end if n not in floats]
    return max(far), CLOSE[next(model.parameters()).dtype]


def products(program: Program) -> int:
    """FLOPs of products of matrices and of convolutions that a chip does in a step, summed over stages."""
    found = 0
    for role in program.roles:
        bodies = {
            body.name: sum(
                op.flops
                for ins in body.instructions if hasattr(ins, "segment")
                for op in program.segments[ins.segment].ops
                if any(part in op.target.replace("_", ".").split(".") for part in PRODUCTS)
            )
            for body in role.bodies
        }  # fmt: skip
        found += sum(bodies[call.body] for call in role.schedule["step"])
    return found


def eager_flops(case: ModelCase) -> int:
    """FLOPs of a forward and backward as torch counts them."""
    model = case.make()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), call_through():
        model(**case.batch(SAMPLES)).loss.backward()
    return int(counter.get_total_flops())


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def said(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(
        f"{type(error).__name__}: {error.text if isinstance(error, UserError) else error}".split()
    )[:400]


def place(error: BaseException) -> str:
    """The last lines of our own code that an error came through."""
    ours = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/i11" in f.filename or "partitioner" in f.filename
    ]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(ours[-3:]))


if __name__ == "__main__":
    main()
