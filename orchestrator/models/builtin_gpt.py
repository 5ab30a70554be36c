"""A readable GPT: pre-norm decoder blocks over token embeddings, with the loss inside `forward`.

Input is `input_ids` and `labels`, both [batch, seq]; `labels[b, t]` is the token that position t must predict
(already shifted), or -100 where nothing is to be predicted; the loss is the mean over the positions that have
a label. Query, key and value are separate linear layers and heads stay whole, so every weight splits over a
tensor-parallel axis by rows or columns: see `tp_plan`. Every block makes its own rotary angles, so that only
the residual stream crosses from one block to the next.

Rotary positions: Su et al., "RoFormer" (2021), eq. 34, halves convention. SwiGLU: Shazeer, "GLU Variants"
(2020). RMS norm: Zhang and Sennrich (2019). Not here: dropout, key-value caches, sampling.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.models.model_specs import Activation, GPTOptions, Norm

IGNORED_LABEL = -100
ROTARY_BASE = 10000.0
NORM_EPS = 1e-5

# How each weight is cut over a tensor-parallel axis: colwise by output, rowwise by input, vocab by token.
TP_PLAN: Mapping[str, str] = {
    "embed": "vocab",
    "blocks.*.attention.query": "colwise",
    "blocks.*.attention.key": "colwise",
    "blocks.*.attention.value": "colwise",
    "blocks.*.attention.output": "rowwise",
    "blocks.*.mlp.gate": "colwise",
    "blocks.*.mlp.up": "colwise",
    "blocks.*.mlp.down": "rowwise",
    "head": "vocab",
}


class GPT(nn.Module):
    """A decoder-only language model: logits without labels, the mean loss with them."""

    tp_plan: Mapping[str, str] = TP_PLAN

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        self.options = options
        self.embed = nn.Embedding(options.vocab, options.width)
        self.positions = None if options.rotary else nn.Embedding(options.max_seq, options.width)
        self.blocks = nn.ModuleList(TransformerBlock(options) for _ in range(options.layers))
        self.norm = make_norm(options)
        self.head = nn.Linear(options.width, options.vocab, bias=False)
        if options.tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        if self.positions is not None:
            # A slice, not a lookup: the positions of a whole sequence are the first rows of the table.
            hidden = hidden + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits if labels is None else next_token_loss(logits, labels)


class TransformerBlock(nn.Module):
    """One residual layer: attention over the sequence, then an MLP at each position."""

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        self.attention_norm = make_norm(options)
        self.attention = Attention(options)
        self.mlp_norm = make_norm(options)
        self.mlp = MLP(options)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        mixed: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return mixed


class Attention(nn.Module):
    """Causal multi-head attention; with fewer key heads than heads, each key head serves a group of heads."""

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        self.head_width = options.head_width
        self.group = options.heads // options.num_kv_heads
        self.rotary = options.rotary
        kv_width = options.num_kv_heads * options.head_width
        self.query = nn.Linear(options.width, options.width, bias=options.bias)
        self.key = nn.Linear(options.width, kv_width, bias=options.bias)
        self.value = nn.Linear(options.width, kv_width, bias=options.bias)
        self.output = nn.Linear(options.width, options.width, bias=options.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        query = self._heads(self.query(hidden))
        key = self._heads(self.key(hidden))
        value = self._heads(self.value(hidden))
        if self.rotary:
            cos, sin = rotary_angles(hidden.shape[1], self.head_width, hidden)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = repeat_heads(key, self.group), repeat_heads(value, self.group)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, projected: Tensor) -> Tensor:
        """[batch, seq, columns] as [batch, heads, seq, head_width]; -1 lets a chip hold only some heads."""
        return projected.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with a non-linearity between, gated for SwiGLU."""

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        width, hidden = options.width, options.hidden_width
        self.activation = options.activation
        is_gated = self.activation is Activation.SWIGLU
        self.gate = nn.Linear(width, hidden, bias=options.bias) if is_gated else None
        self.up = nn.Linear(width, hidden, bias=options.bias)
        self.down = nn.Linear(hidden, width, bias=options.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        if self.gate is not None:
            inner = F.silu(self.gate(hidden)) * up
        elif self.activation is Activation.RELU:
            inner = F.relu(up)
        else:
            inner = F.gelu(up, approximate="tanh")
        down: Tensor = self.down(inner)
        return down


def make_norm(options: GPTOptions) -> nn.Module:
    """A fresh normalisation layer of the kind that the options ask for."""
    if options.norm is Norm.RMS:
        return nn.RMSNorm(options.width, eps=NORM_EPS)
    return nn.LayerNorm(options.width, eps=NORM_EPS, bias=options.bias)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats over the positions with a label; half precision is summed in fp32."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)


def rotary_angles(seq: int, head_width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [seq, head_width / 2], of position x base^(-2i / head_width), in `like`'s dtype."""
    # Angles reach `seq` radians: half precision cannot tell neighbouring positions apart there.
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_width, 2, dtype=dtype, device=like.device) / head_width
    positions = torch.arange(seq, dtype=dtype, device=like.device)
    angles = positions[:, None] * torch.exp(exponent * -math.log(ROTARY_BASE))[None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (column i, column i + half) turned by its position's angle."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def repeat_heads(heads: Tensor, group: int) -> Tensor:
    """[batch, kv_heads, seq, width] with every head standing `group` times in a row."""
    if group == 1:
        return heads
    batch, _, seq, width = heads.shape
    return heads.unsqueeze(2).expand(batch, -1, group, seq, width).flatten(1, 2)


def initial_parameter(name: str, shape: torch.Size, options: GPTOptions, seed: int) -> Tensor:
    """The fp32 start value of one parameter, from a generator keyed by (seed, name): order never matters.

    Matrices are normal with standard deviation sqrt(2 / (5 width)) (Nguyen and Salazar, "Transformers without
    Tears", 2019: 0.023 at width 768), those that write to the residual stream smaller by sqrt(2 layers) so
    that its variance does not grow with depth (Radford et al., 2019, section 2.3). Norms start at one, biases
    at zero.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = math.sqrt(2.0 / (5.0 * options.width))
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        deviation /= math.sqrt(2.0 * options.layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def build_gpt(options: GPTOptions, *, device: torch.device, dtype: torch.dtype, seed: int) -> GPT:
    """A GPT with its start values on `device`; on the meta device shapes only, whatever the size."""
    with torch.device("meta"):
        model = GPT(options).to(dtype)
    if device.type == "meta":
        return model
    model = model.to_empty(device=device)
    if options.tied:
        model.head.weight = model.embed.weight  # to_empty gives each name its own storage
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_parameter(name, parameter.shape, options, seed))
    return model
