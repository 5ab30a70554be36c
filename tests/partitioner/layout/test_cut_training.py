"""Models cut by tensor parallelism: two steps of every kind of layer are those of plain torch, and most work is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from comms.errors import PartitionError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import partition

Layers = dict[str, nn.Module | nn.Parameter]
Forward = Callable[[Any, torch.Tensor], torch.Tensor]
Case = tuple[Callable[[], Layers], Forward]
CUT, STEPS, WIDTH, HEADS, TIME = 0.9, 2, 16, 4, 6


class Net(nn.Module):
    def __init__(self, layers: Callable[[], Layers], forward: Forward) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, layer in layers().items():
                setattr(self, name, layer)
            for name, param in self.named_parameters():  # biases and norms start at values that tell
                if name.endswith("bias") or "norm" in name:
                    nn.init.normal_(param, 1.0, 0.1)
        self.double()
        self.run = forward

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        ((_, x),) = batch.items()
        made = self.run(self, x)
        return made if made.dim() == 0 else made.square().mean() + made.sin().sum() / 100


def sequences(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, TIME, WIDTH, generator=seeded(step), dtype=torch.float64)}


def pictures(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 4, 8, 8, generator=seeded(step), dtype=torch.float64)}


def words(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 13, (4, TIME), generator=seeded(step))}


def seeded(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def heads(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.unflatten(-1, (number, -1)).transpose(-2, -3)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    made = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return made.transpose(1, 2).flatten(2)


def thirds(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(attended(*(heads(part, HEADS) for part in m.qkv(x).chunk(3, -1))))


def thirds_in_a_dim(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return m.out(attended(q, k, v))


def per_head(m: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-NeoX, Bloom: of each head its query, key and value."""
    q, k, v = m.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
    return m.out(attended(q, k, v))


def per_head_middle(m: Any, x: torch.Tensor) -> torch.Tensor:
    fused = m.qkv(x).view(*x.shape[:2], HEADS, 3, WIDTH // HEADS)
    q, k, v = (fused[:, :, :, i].transpose(1, 2) for i in range(3))
    return m.out(attended(q, k, v))


def per_group(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Falcon: of each group its queries, one key and one value."""
    fused = m.qkv(x).view(*x.shape[:2], 4, 4, WIDTH // HEADS)
    q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    return m.out(attended(*(part.transpose(1, 2) for part in (q, k, v))))


def grouped_queries(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
    return m.out(attended(heads(q, HEADS), heads(k, HEADS // 2), heads(v, HEADS // 2)))


def batched_experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    every = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), m.up)
    gate, up = every.chunk(2, -1)
    weights = m.router(x).flatten(0, 1).softmax(-1)
    return (torch.bmm(F.silu(gate) * up, m.down) * weights.t().unsqueeze(-1)).sum(0)


def summed_experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    weights = m.router(x).softmax(-1)
    return torch.einsum("bse,bsi,eij->bsj", weights, x, m.up)


def eager_experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    weights = m.router(x).softmax(-1)
    return sum(weights[..., i : i + 1] * m.down[i](m.up[i](x).relu()) for i in range(3))


def cross(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(m.head(m.table(x)).flatten(0, 1), (x.flatten() + 1) % 13, ignore_index=3)


def tied(m: Any, x: torch.Tensor) -> torch.Tensor:
    logits = F.linear(m.mix(m.table(x)).tanh(), m.table.weight)
    return F.cross_entropy(logits.flatten(0, 1), (x.flatten() + 1) % 13)


def shifted(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Rows that fill a slice up are zeros no longer."""
    rows = m.head.weight + 1
    return m.head(m.table(x)).square().mean() + (rows.transpose(0, 1) @ rows).square().mean() / 100


def fused(width: int, **more: Any) -> Callable[[], Layers]:
    return lambda: {"qkv": nn.Linear(WIDTH, width, **more), "out": nn.Linear(WIDTH, WIDTH)}


def self_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.mix(x, x, x, need_weights=False)[0] + m.mix(x, x, x)[0]


def standardized(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Big transfer: each channel's weights have mean 0 and variance 1."""
    weight = F.batch_norm(m.up.weight.reshape(1, 16, -1), None, None, training=True).reshape_as(m.up.weight)
    return m.down(F.conv2d(x, weight, m.up.bias).relu())


def mixed_sections(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Mamba 2: a depthwise convolution over what is taken apart behind it, and repeated."""
    y, keys, values = m.each(m.up(x).mT)[..., :TIME].mT.split([32, 16, 16], -1)
    return m.down(y * heads(keys * values, 4).repeat_interleave(2, 1).transpose(1, 2).flatten(2))


def wider_sections(m: Any, x: torch.Tensor) -> torch.Tensor:
    one, other = m.up(x).split([32, 16], -1)
    one, other = m.each(torch.cat([one.tanh(), other], -1).mT).mT.split([64, 32], -1)
    return m.down(one[..., ::2] * other)


SEQUENCES: dict[str, Case] = {
    "pair": (lambda: {"up": nn.Linear(WIDTH, 40), "down": nn.Linear(40, WIDTH)},
             lambda m, x: m.down(F.gelu(m.up(x)))),
    "gated": (lambda: {"up": nn.Linear(WIDTH, 40), "down": nn.Linear(20, WIDTH)},
              lambda m, x: m.down(F.glu(m.up(x)))),
    "thirds": (fused(3 * WIDTH), thirds),
    "thirds in a dim": (fused(3 * WIDTH), thirds_in_a_dim),
    "per head": (fused(3 * WIDTH), per_head),
    "per head, in a dim": (fused(3 * WIDTH, bias=False), per_head_middle),
    "per group": (lambda: {"qkv": nn.Linear(WIDTH, 64), "out": nn.Linear(32, WIDTH)}, per_group),
    "fewer keys": (fused(2 * WIDTH), grouped_queries),
    "multi-head": (lambda: {"mix": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}, self_attention),
    "other widths": (
        lambda: {"mix": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=8, vdim=8)},
        lambda m, x: m.mix(x, x[..., :8], x[..., 8:])[0]),
    "encoder": (lambda: {"layer": nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)},
                lambda m, x: m.layer(x)),
    "decoder": (lambda: {"layer": nn.TransformerDecoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)},
                lambda m, x: m.layer(x, x.flip(1))),
    "batched experts": (
        lambda: {"router": nn.Linear(WIDTH, 3), "up": nn.Parameter(torch.randn(3, WIDTH, 40)),
                 "down": nn.Parameter(torch.randn(3, 20, WIDTH))}, batched_experts),
    "eager experts": (
        lambda: {"router": nn.Linear(WIDTH, 3), "up": nn.ModuleList(nn.Linear(WIDTH, 32) for _ in range(3)),
                 "down": nn.ModuleList(nn.Linear(32, WIDTH) for _ in range(3))}, eager_experts),
    "sections": (
        lambda: {
            "up": nn.Linear(WIDTH, 64),
            "each": nn.Conv1d(64, 64, 3, padding=2, groups=64),
            "down": nn.Linear(32, WIDTH),
        },
        mixed_sections,
    ),
    **{
        f"{groups} groups, wider": (
            lambda groups=groups: {"up": nn.Conv1d(WIDTH, 32, 1), "down": nn.Linear(64, WIDTH),
                                   "each": nn.ConvTranspose1d(32, 64, 3, groups=groups)},
            lambda m, x: m.down(m.each(m.up(x.mT)).mT)) for groups in (4, 32)
    },
    "sections, wider": (
        lambda: {"up": nn.Linear(WIDTH, 48), "each": nn.ConvTranspose1d(48, 96, 3, groups=48),
                 "down": nn.Linear(32, WIDTH)}, wider_sections),
    "a weight of one row": (
        lambda: {"up": nn.Linear(WIDTH, 32), "row": nn.Linear(32, 1), "at": nn.Parameter(torch.randn(()))},
        lambda m, x: F.linear(m.up(x).tanh(), m.row.weight[0], m.at).mT + m.up(x)[..., :1]),
    "times": (lambda: {"up": nn.Conv1d(WIDTH, 32, 3, padding=1), "down": nn.Conv1d(32, WIDTH, 1)},
              lambda m, x: m.down(m.up(x.mT).relu()).mT),
    "one entry per chip": (
        lambda: {"up": nn.Linear(WIDTH, 4), "down": nn.Linear(4, WIDTH)},
        lambda m, x: m.down(m.up(x).tanh().squeeze().squeeze(-1)),
    ),
    "flattened": (lambda: {"up": nn.Linear(WIDTH, 32)},
                  lambda m, x: (y := m.up(x)).flatten().cumsum(0).view_as(y) / 100),
    "flattened and back": (lambda: {"up": nn.Linear(WIDTH, 32), "down": nn.Linear(32 * TIME, WIDTH)},
                           lambda m, x: m.down(m.up(x).flatten(1).tanh())),
}  # fmt: skip

PICTURES: dict[str, Case] = {
    "channels": (lambda: {"up": nn.Conv2d(4, 32, 3, padding=1), "down": nn.Conv2d(32, 8, 3, stride=2)},
                 lambda m, x: m.down(F.max_pool2d(m.up(x).relu(), 2))),
    "depthwise": (
        lambda: {"up": nn.Conv2d(4, 32, 1), "norm": nn.GroupNorm(4, 32), "each": nn.Conv2d(32, 32, 3, groups=32),
                 "down": nn.Conv2d(32, 8, 1)},
        lambda m, x: m.down(m.each(m.norm(m.up(x))).relu())),
    "groups": (lambda: {"up": nn.Conv2d(4, 32, 1), "each": nn.Conv2d(32, 16, 3, groups=4), "down": nn.Conv2d(16, 8, 1)},
               lambda m, x: m.down(F.avg_pool2d(m.each(m.up(x)), 2))),
    "transposed": (lambda: {"up": nn.ConvTranspose2d(4, 32, 2, stride=2), "down": nn.ConvTranspose2d(32, 4, 2)},
                   lambda m, x: m.down(m.up(x).relu())),
    "pools and norms": (
        lambda: {"up": nn.Conv2d(4, 16, 3), "norm": nn.InstanceNorm2d(16, affine=True), "slope": nn.PReLU(16),
                 "down": nn.Linear(16, 4)},
        lambda m, x: m.down(F.adaptive_avg_pool2d(m.slope(m.norm(m.up(x))), 1).flatten(1))),
    "u": (lambda: {"up": nn.Conv2d(4, 16, 3, padding=1), "mid": nn.Conv2d(16, 16, 3, padding=1),
                   "down": nn.Conv2d(32, 4, 3, padding=1)},
          lambda m, x: m.down(torch.cat([y := m.up(x), F.interpolate(m.mid(F.max_pool2d(y, 2)), scale_factor=2)], 1))),
    "batch norm": (
        lambda: {"up": nn.Conv2d(4, 16, 3), "norm": nn.BatchNorm2d(16), "down": nn.Conv2d(16, 4, 3)},
        lambda m, x: m.down(m.norm(m.up(x)).relu()),
    ),
    "standardized weights": (lambda: {"up": nn.Conv2d(4, 16, 3), "down": nn.Conv2d(16, 4, 3)}, standardized),
    "upsampled": (lambda: {"up": nn.Conv2d(4, 16, 3), "down": nn.Conv2d(16, 4, 1)},
                  lambda m, x: m.down(F.interpolate(m.up(x), scale_factor=2, mode="bilinear"))),
}  # fmt: skip

WORDS: dict[str, Case] = {
    "padded vocabulary": (lambda: {"table": nn.Embedding(13, WIDTH), "head": nn.Linear(WIDTH, 13)}, cross),
    "tied": (lambda: {"table": nn.Embedding(13, WIDTH), "mix": nn.Linear(WIDTH, WIDTH)}, tied),
    "padding": (lambda: {"table": nn.Embedding(13, WIDTH, padding_idx=2), "mix": nn.Linear(WIDTH, 32)},
                lambda m, x: m.mix(m.table(x))),
    "bags": (lambda: {"bag": nn.EmbeddingBag(13, WIDTH, mode="sum"), "mix": nn.Linear(WIDTH, 32)},
             lambda m, x: m.mix(m.bag(x))),
    "bags of means": (lambda: {"bag": nn.EmbeddingBag(13, WIDTH, padding_idx=1), "mix": nn.Linear(WIDTH, 32)},
                      lambda m, x: m.mix(m.bag(x))),
}  # fmt: skip
KINDS = ((SEQUENCES, sequences), (PICTURES, pictures), (WORDS, words))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("case", "batch"),
    [pytest.param(case, batch, id=name) for cases, batch in KINDS for name, case in cases.items()],
)
def test_a_step_is_that_of_plain_torch_and_most_of_it_is_cut(
    case: Case, batch: Callable[[int], dict[str, Any]], tp: int, trained_alike: Any
) -> None:
    batches = map(batch, range(STEPS))
    facts = trained_alike(Net(*case), batches, Plan(tp=tp), momentum=0.5, rel=1e-10).program.facts
    assert facts["tp_cut_flops"] > CUT, facts["tp_copied"]


def test_rows_and_columns_that_only_fill_up_hold_zeros_and_are_not_clipped(
    laptop: Any, one_thread: None
) -> None:
    plain, module = Net(*WORDS["tied"]), Net(*WORDS["tied"])
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01)
    own = torch.optim.AdamW(module.parameters(), 0.01)
    step = distribute(module, own, laptop, plan=Plan(tp=2), chips=2, clip_norm=0.01)
    for index in range(STEPS):
        optimizer.zero_grad()
        plain(**words(index)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizer.step()
        step(words(index))
    assert step.program is not None and step._runner is not None
    (role,) = step.program.roles
    (table,) = [t for t in role.tensors if t.name == "table.weight"]
    assert (table.spec.shape, table.sections) == ((7, WIDTH), (13,))
    assert not step._runner.chips[1].value(table.id)[-1].any()
    step.sync()
    for (name, mine), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_logits_of_a_padded_vocabulary_are_never_gathered(laptop: Any, one_thread: None) -> None:
    program = partition(Net(*WORDS["padded vocabulary"]), words(0), Plan(tp=2))
    sizes = [t.spec.shape for role in program.roles for t in role.tensors]
    assert (4 * TIME, 7) in sizes and (4 * TIME, 13) not in sizes


@pytest.mark.parametrize(("tp", "rows"), [(2, 13), (2, 15), (4, 15), (4, 29)])
def test_what_fills_a_slice_up_is_not_summed(tp: int, rows: int, trained_alike: Any) -> None:
    layers = lambda: {"table": nn.Embedding(13, 8), "head": nn.Linear(8, rows)}  # noqa: E731
    trained_alike(Net(layers, shifted), map(words, range(STEPS)), Plan(tp=tp), momentum=0.5, rel=1e-10)


@pytest.mark.parametrize("wrong", [-1, 13, 14, 99])
@pytest.mark.parametrize("what", ["words", "labels"])
def test_a_word_that_no_chip_has_is_an_error_as_in_torch(
    wrong: int, what: str, laptop: Any, one_thread: None
) -> None:
    def lost(m: Any, x: torch.Tensor) -> torch.Tensor:
        seen, labels = (x, x.clamp(0, 12)) if what == "words" else (x.clamp(0, 12), x)
        return F.cross_entropy(m.head(m.table(seen)).flatten(0, 1), labels.flatten())

    module = Net(WORDS["padded vocabulary"][0], lost)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(tp=2), chips=2)
    batch = words(0)
    step(batch)
    batch["x"][1, 2] = wrong
    with pytest.raises(Exception, match=r"out of (range|bounds)"):
        step(batch)


def test_what_is_not_cut_is_named_with_the_reason(laptop: Any, one_thread: None) -> None:
    layers = {"net": nn.LSTM(WIDTH, WIDTH, batch_first=True), "odd": nn.Linear(WIDTH, 7)}
    module = Net(lambda: layers, lambda m, x: m.odd(m.net(x)[0]) @ x[:, :7, :7].mT[:, :, :7])
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(tp=2), chips=2)
    with pytest.warns(
        UserWarning, match="tp 2 cuts .* net.weight_ih_l0 .used by lstm.; .* matmul, of whole operands"
    ):
        step(sequences(0))


def test_attention_without_heads_counts_once_and_is_whole_on_every_chip(
    laptop: Any, one_thread: None
) -> None:
    """Below autograd it is the products that it consists of."""
    case = fused(3 * WIDTH), lambda m, x: m.out(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1)))
    with FlopCounterMode(display=False) as counter:
        Net(*case)(**sequences(0)).backward()
    assert partition(Net(*case), sequences(0), Plan()).facts["model_flops"] == counter.get_total_flops()
    weights, attention = 2 * 4 * TIME * WIDTH * 4 * WIDTH, 2 * 2 * 4 * TIME * TIME * WIDTH
    cut = partition(Net(*case), sequences(0), Plan(tp=2)).facts["tp_cut_flops"]
    assert cut == pytest.approx(weights / (weights + attention))


def test_a_model_of_which_nothing_can_be_cut_is_refused(laptop: Any, one_thread: None) -> None:
    module = Net(lambda: {"odd": nn.Linear(7, 7)}, lambda m, x: m.odd(x[..., :7]))
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(tp=2), chips=2)
    with pytest.raises(PartitionError, match="tp 2 cuts nothing"):
        step(sequences(0))
