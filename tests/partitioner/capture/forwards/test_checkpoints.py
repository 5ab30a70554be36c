"""torch.utils.checkpoint: the same training under every plan, computed again in the backward, and counted."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.runs.data import step_key
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.keyed_random import keyed_random
from partitioner.capture.tracing import trace_module
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import partition
from partitioner.program.peak_memory import peak_memory
from partitioner.program.program import Compute, Program

Run = Callable[[Sequence["Block"], Tensor], Tensor]
STEPS, SAMPLES, SEQ, WIDTH, HIDDEN, BLOCKS = 2, 8, 5, 8, 32, 4
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.linear")
VALUE = 8 * SAMPLES * SEQ  # bytes of a number per token
FEW = [Plan(dp=2, microbatches=2, zero=1), Plan(pp=4, microbatches=2)]
MANY = [Plan(), Plan(microbatches=4), Plan(pp=2, microbatches=2), Plan(tp=2), Plan(dp=2, tp=2, pp=2)]
again = partial(checkpoint, use_reentrant=False)
old = partial(checkpoint, use_reentrant=True)


class Block(nn.Module):
    """A residual block with dropout, whose first half may be checkpointed by itself."""

    def __init__(self, drop: float, call: Any = None) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.down, self.drop, self.call = nn.Linear(HIDDEN, WIDTH), drop, call

    def half(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x)).mul(0.5).tanh()  # writes into what it makes

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.call(self.half, x) if self.call else self.half(x)
        return x + F.dropout(self.down(hidden), self.drop) * scale

    def both(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(x), {"extra": self.half(x).mean(-1, keepdim=True)}


class Blocks(nn.Module):
    """Blocks, run as `run` says, between two linear layers; a mean squared error."""

    def __init__(self, run: Run, drop: float = 0.0, inner: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
            self.blocks = nn.ModuleList(Block(drop, inner) for _ in range(BLOCKS))
        self.run = run
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.leave(self.run(list(self.blocks), self.enter(x))), y)


def each(call: Any, **settings: Any) -> Run:
    """Blocks one after the other, each by `call(block, x)`."""
    return lambda blocks, x: reduce(lambda value, block: call(block, value, **settings), blocks, x)


def summed(call: Any) -> Run:
    """Blocks that return a tuple with a dict in it."""

    def one(block: Block, x: Tensor) -> Tensor:
        out, more = call(block.both, x)
        return out + more["extra"]

    return each(one)


def in_two(blocks: Sequence[Block], x: Tensor) -> Tensor:
    return checkpoint_sequential(nn.Sequential(*blocks), 2, x, use_reentrant=False)


def products_saved(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op).startswith(PRODUCTS) else CheckpointPolicy.PREFER_RECOMPUTE


def called(function: Any, x: Tensor, **settings: Any) -> Any:
    return function(x, **settings)


PLAIN = each(called)
SAVING = partial(again, context_fn=partial(create_selective_checkpoint_contexts, products_saved))
FORMS: dict[
    str, tuple[Run, Any, Run]
] = {  # how blocks run, how their halves do, and the same without checkpoints
    "plain": (PLAIN, None, PLAIN),
    "as torch advises": (each(again), None, PLAIN),
    "reentrant": (each(old), None, PLAIN),
    "by keyword": (each(again, scale=0.5), None, each(called, scale=0.5)),
    "tuples": (summed(again), None, summed(called)),
    "nested": (each(again), again, PLAIN),
    "nested in reentrant": (each(old), again, PLAIN),
    "reentrant in it": (each(again), old, PLAIN),
    "products saved": (each(SAVING), None, PLAIN),
    "products saved, halves nested": (each(SAVING), again, PLAIN),
    "several blocks in one": (in_two, None, PLAIN),
    "all in one": (lambda blocks, x: again(nn.Sequential(*blocks), x), None, PLAIN),
    "other settings": (each(again, preserve_rng_state=False, determinism_check="none"), None, PLAIN),
}


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(SAMPLES, SEQ, 4, generator=generator, dtype=torch.float64),
            "y": torch.randn(SAMPLES, SEQ, 2, generator=generator, dtype=torch.float64)}  # fmt: skip


def one_chip(module: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = batch(step)
        with keyed_random(torch.tensor(step_key(0, step)), torch.tensor(0)):
            loss = module(**inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def require_same(
    module: Blocks, plan: Plan, losses: Sequence[float], expected: nn.Module, laptop: Any
) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    step = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips)
    assert [step(batch(index)) for index in range(STEPS)] == pytest.approx(losses, rel=1e-12)
    step.sync()
    for mine, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "plan"),
    [*((form, FEW[place % 2]) for place, form in enumerate(FORMS)), *(("nested", plan) for plan in MANY)],
    ids=str,
)
def test_a_second_run_draws_the_same_and_gives_the_same_gradients(
    form: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    run, inner, without = FORMS[form]
    expected = Blocks(without, 0.2)
    losses = one_chip(expected)
    require_same(Blocks(run, 0.2, inner), plan, losses, expected, laptop)


def from_inputs(blocks: Sequence[Block], x: Tensor) -> Tensor:
    return each(called)(blocks[1:], old(blocks[0], x.detach()))


@pytest.mark.parametrize("run", [from_inputs, summed(old)], ids=["from inputs", "in a dict"])
def test_gradients_that_the_reentrant_form_loses_are_lost(run: Run, laptop: Any, one_thread: None) -> None:
    expected = Blocks(run)
    optimizer, losses = torch.optim.SGD(expected.parameters(), 0.1), []
    for step in range(STEPS):  # by torch itself: nothing draws
        optimizer.zero_grad()
        loss = expected(**batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    require_same(Blocks(run), Plan(dp=2, pp=2, microbatches=2), losses, expected, laptop)


def costs(form: str, plan: Plan | None = None) -> tuple[Program, int]:
    """The Program of a form, and the bytes that its first stage keeps for backwards at most."""
    run, inner, _ = FORMS[form]
    program = partition(Blocks(run, 0.2, inner), batch(0), plan or Plan())
    return program, peak_memory(program)[0].activation_bytes


def product_flops(program: Program) -> int:
    """FLOPs of the products of matrices in one step of all roles and replicas."""
    found = 0
    for role in program.roles:
        for call in role.schedule["step"]:
            segments = [
                program.segments[i.segment]
                for i in role.body[call.body].instructions
                if isinstance(i, Compute)
            ]
            found += sum(op.flops for s in segments for op in s.ops if op.target.startswith(PRODUCTS))
    return found * dict(program.axes)["dp"]


def eager_flops(form: str) -> int:
    run, inner, _ = FORMS[form]
    with FlopCounterMode(display=False) as counter:
        Blocks(run, 0.0, inner)(**batch(0)).backward()
    return int(counter.get_total_flops())


# torch's reentrant form computes all of a part again, also what no gradient needs; half of a tuple likewise
AS_IN_TORCH = [form for form in FORMS if "reentrant" not in form and form != "tuples"]


@pytest.mark.parametrize("form", AS_IN_TORCH)
def test_what_torch_computes_twice_is_counted_apart(form: str) -> None:
    run, inner, _ = FORMS[form]
    program = partition(Blocks(run, 0.0, inner), batch(0), Plan())
    once, total = eager_flops("plain"), eager_flops(form)
    assert program.facts["model_flops"] == once
    assert program.facts["recomputed_flops"] == total - once


@pytest.mark.parametrize("form", FORMS)
def test_what_is_counted_is_what_runs(form: str) -> None:
    program, _ = costs(form, Plan(dp=2, microbatches=2))
    assert product_flops(program) == program.facts["model_flops"] + program.facts["recomputed_flops"]


def test_only_what_a_checkpoint_reads_is_kept() -> None:
    kept = {form: costs(form)[1] for form in ("as torch advises", "products saved", "all in one")}
    reads = BLOCKS * VALUE * WIDTH  # of each block
    end = VALUE * (WIDTH + 2 + 2)  # what the last layer reads, and the error beside it
    assert reads + VALUE * WIDTH <= kept["as torch advises"] <= reads + end
    assert kept["all in one"] == kept["as torch advises"] - (BLOCKS - 1) * VALUE * WIDTH
    assert kept["products saved"] == kept["as torch advises"] + BLOCKS * VALUE * HIDDEN


def counting(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return m.lin(x)


def outside(m: Any, x: Tensor) -> Tensor:
    return m.lin(x.tanh_())


@pytest.mark.parametrize("part", [counting, outside])
def test_writes_out_of_a_checkpoint_are_refused_as_torch_does_them_twice(part: Any, refusal: Any) -> None:
    error = refusal(lambda m, x: again(partial(part, m), m.lin(x)).sum())
    assert "inside a checkpoint" in error.problem and "twice" in error.problem
    assert error.where and "outside" in error.hint


def test_contexts_that_choose_nothing_are_refused(refusal: Any) -> None:
    def quiet() -> Any:
        return torch.no_grad(), torch.enable_grad()

    error = refusal(lambda m, x: again(m.lin, x, context_fn=quiet).sum())
    assert error.problem == "checkpoint with a context_fn of its own" and "quiet" in error.where


def test_without_gradients_nothing_is_computed_again(scripted: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = again(m.lin, x)
        return m.lin(hidden).sum()

    program = partition(scripted(forward), {"x": torch.zeros(2, 4, dtype=torch.float64)}, Plan())
    assert program.facts["recomputed_flops"] == 0


def test_afterwards_checkpoints_are_torchs(scripted: Any) -> None:
    runs = []

    def part(x: Tensor) -> Tensor:
        runs.append(x)
        return x.exp().exp()

    module = scripted(lambda m, x: again(part, m.lin(x)).sum())
    trace_module(module, {"x": torch.zeros(2, 4, dtype=torch.float64)}, None)
    runs.clear()
    module(torch.zeros(2, 4, dtype=torch.float64)).backward()
    assert len(runs) == 2


class BesideRecurrent(nn.Module):
    """A checkpointed layer behind a recurrent one."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.layer = kind(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return again(lambda h: self.layer(h).tanh(), self.recurrent(x)[0]).mean()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_only_what_is_checkpointed_counts_as_computed_again(kind: type[nn.RNNBase]) -> None:
    program = partition(BesideRecurrent(kind), {"x": torch.randn(4, 5, 8)}, Plan())
    assert program.facts["recomputed_flops"] == 2 * 4 * 5 * 8 * 8
