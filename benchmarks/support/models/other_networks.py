"""Networks of other kinds, written here: recurrent, of graphs, of tables, mixers, torch's own transformers."""

import torch
from support.models.model_case import (
    CHANNELS,
    CLASSES,
    SEQ,
    VOCAB,
    Batch,
    ModelCase,
    classes,
    numbers,
    own_case,
    some,
    tokens,
)
from torch import Tensor, nn
from torch.nn import functional as F

NODES, TABLES = 6, 3


class Recurrent(nn.Module):
    """Embedding, a recurrent network, and a head for the next token or for the sample."""

    def __init__(self, kind: str, *, two_ways: bool = False, layers: int = 1, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.embed = nn.Embedding(VOCAB, 16, padding_idx=0)
        net = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.net = net(16, 32, layers, batch_first=True, bidirectional=two_ways)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(64 if two_ways else 32, CLASSES if last else VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        out = self.drop(self.net(self.embed(input_ids))[0])
        return self.head(out[:, -1] if self.last else out)


class Cells(nn.Module):
    """Sequence to sequence by cells, step by step, with attention (Bahdanau et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(VOCAB, 16), nn.GRU(16, 32, batch_first=True)
        self.cell, self.score = nn.LSTMCell(48, 32), nn.Bilinear(32, 32, 1)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of all places."""
        keys, last = self.encoder(self.embed(source))
        hidden, memory = last[0], torch.zeros_like(last[0])
        out = []
        for place in range(target.shape[1]):
            weights = self.score(hidden[:, None].expand_as(keys).contiguous(), keys).softmax(1)
            context = (weights * keys).sum(1)
            hidden, memory = self.cell(
                torch.cat([self.embed(target[:, place]), context], -1), (hidden, memory)
            )
            out.append(self.head(hidden))
        return torch.stack(out, 1)


class Graph(nn.Module):
    """Graph convolution (Kipf and Welling 2017) and attention over dense neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32)])
        self.source, self.target = nn.Linear(32, 1), nn.Linear(32, 1)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Classes of graphs."""
        near = adjacency + torch.eye(NODES, dtype=adjacency.dtype)
        degree = near.sum(-1).rsqrt()
        scaled = degree[:, :, None] * near * degree[:, None]
        for layer in self.layers:
            x = F.relu(scaled @ layer(x))
        scores = F.leaky_relu(self.source(x) + self.target(x).transpose(1, 2))
        weights = scores.masked_fill(near == 0, -1e9).softmax(-1)
        return self.head((F.dropout(weights, 0.1, self.training) @ x).max(1).values)


class Messages(nn.Module):
    """Messages along a list of edges, summed at their ends by index_add; all samples share the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.message, self.head = nn.Linear(8, 16), nn.Linear(32, 16), nn.Linear(16, CLASSES)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]]))

    def forward(self, x: Tensor) -> Tensor:
        """Classes of graphs."""
        x = torch.tanh(self.enter(x))
        sent = F.relu(self.message(torch.cat([x[:, self.edges[0]], x[:, self.edges[1]]], -1)))
        x = x + torch.zeros_like(x).index_add(1, self.edges[1], sent)
        return self.head(x.mean(1))


class Recommender(nn.Module):
    """DLRM (Naumov et al. 2019): bags of categories and dense numbers, pairwise products, a click."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(VOCAB, 16, mode=m) for m in ("sum", "mean", "max"))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, bags: Tensor) -> Tensor:
        """Logits of clicks."""
        low = self.bottom(dense)
        all_of = torch.stack([low, *(table(bags[:, i]) for i, table in enumerate(self.tables))], 1)
        products = all_of @ all_of.transpose(1, 2)
        rows, columns = torch.tril_indices(TABLES + 1, TABLES + 1, -1)
        return self.top(torch.cat([low, products[:, rows, columns]], -1)).squeeze(-1)


class WideDeep(nn.Module):
    """Wide and deep (Cheng et al. 2016), with factorization (Rendle 2010)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide = nn.Embedding(VOCAB, 8, max_norm=None), nn.Embedding(VOCAB, 1)
        self.deep = nn.Sequential(
            nn.Linear(24, 32), nn.BatchNorm1d(32), nn.PReLU(), nn.Dropout(0.3), nn.Linear(32, 1)
        )

    def forward(self, fields: Tensor) -> Tensor:
        """Logits of clicks."""
        found = self.embed(fields)
        pairs = 0.5 * (found.sum(1).square() - found.square().sum(1)).sum(-1)
        return self.wide(fields).sum((1, 2)) + pairs + self.deep(found.flatten(1)).squeeze(-1)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8 * 8 * CHANNELS, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(32), "across": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
            "norm2": nn.LayerNorm(32), "along": nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))})
            for _ in range(2))  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        x = self.enter(
            x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(x.shape[0], 16, -1)
        )
        for block in self.blocks:
            x = x + block["across"](block["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + block["along"](block["norm2"](x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own encoder, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, 32), nn.Parameter(torch.randn(SEQ, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Classes."""
        hidden = self.layers(self.embed(input_ids) + self.places, src_key_padding_mask=input_ids == 0)
        return self.head(hidden[:, 0])


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.net = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of all places."""
        seen = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        return self.head(self.net(self.embed(source), self.embed(target), tgt_mask=seen))


class Twins(nn.Module):
    """Contrast within the batch (Chen et al. 2020): every sample meets every other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """The loss of finding each other."""
        a, b = (F.normalize(self.net(v), dim=-1) for v in (one, other))
        return F.cross_entropy(a @ b.T / 0.5, torch.arange(a.shape[0]))


class Critic(nn.Module):
    """A reward model over pairs: log-sigmoid of the difference, spectral norm on its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.utils.parametrizations.weight_norm(nn.Linear(8, 32))
        self.body = nn.Sequential(
            nn.Mish(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 1)
        )

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """How wrong the order is."""
        return -F.logsigmoid(self.body(self.enter(one)) - self.body(self.enter(other))).mean()


class Policy(nn.Module):
    """Proximal policy (Schulman et al. 2017): clipped ratios, a value, an entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.act, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, state: Tensor, action: Tensor, before: Tensor, advantage: Tensor) -> Tensor:
        """The surrogate's loss."""
        hidden = self.body(state)
        chosen = torch.distributions.Categorical(logits=self.act(hidden))
        ratio = (chosen.log_prob(action) - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return (
            -gain.mean()
            + F.mse_loss(self.value(hidden).squeeze(-1), advantage)
            - 0.01 * chosen.entropy().mean()
        )


def spoken(n: int) -> Batch:
    """Tokens, and the token at each place."""
    return {"input_ids": tokens(n), "labels": some(tokens(n, number=1))}


def judged(n: int) -> Batch:
    """Tokens, some of them padding, and a class."""
    ids = tokens(n)
    return {"input_ids": ids.masked_fill(some(ids) < 0, 0), "labels": classes(n)}


def translated(n: int) -> Batch:
    """Source, target and labels."""
    return {"source": tokens(n), "target": tokens(n, 6, 1), "labels": some(tokens(n, 6, 2))}


def graphs(n: int, *, dense: bool) -> Batch:
    """Values of nodes, perhaps who is near, and a class."""
    near = (numbers(n, NODES, NODES, number=1) > 0).double()
    near = ((near + near.transpose(1, 2)) > 0).double()
    return {"x": numbers(n, NODES, 8), "labels": classes(n)} | ({"adjacency": near} if dense else {})


def clicks(n: int) -> Batch:
    """Numbers, bags and clicks."""
    return {"dense": numbers(n, 8), "bags": tokens(n, TABLES * 4).view(n, TABLES, 4),
            "labels": classes(n, count=2).double()}  # fmt: skip


def two(n: int) -> Batch:
    """Two views."""
    return {"one": numbers(n, 8), "other": numbers(n, 8, number=1)}


def steps(n: int) -> Batch:
    """States, actions, what they were worth."""
    return {"state": numbers(n, 8), "action": classes(n, count=4), "before": -numbers(n, number=1).abs(),
            "advantage": numbers(n, number=2)}  # fmt: skip


def mixed(n: int) -> Batch:
    """Images as `x`, and a class of each."""
    return {"x": numbers(n, CHANNELS, 32, 32), "labels": classes(n)}


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the labels that count."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def cases() -> list[ModelCase]:
    """All of them."""
    click = F.binary_cross_entropy_with_logits
    return [
        own_case("lstm", "recurrent", lambda: Recurrent("lstm"), spoken, next_token),
        own_case("gru", "recurrent", lambda: Recurrent("gru", layers=2), spoken, next_token),
        own_case("rnn", "recurrent", lambda: Recurrent("rnn"), spoken, next_token),
        own_case("lstm two ways", "recurrent", lambda: Recurrent("lstm", two_ways=True, last=True), judged,
                 F.cross_entropy),
        own_case("cells", "recurrent", Cells, translated, next_token),
        own_case("graph", "graph", Graph, lambda n: graphs(n, dense=True), F.cross_entropy),
        own_case("messages", "graph", Messages, lambda n: graphs(n, dense=False), F.cross_entropy),
        own_case("recommender", "tables", Recommender, clicks, click),
        own_case("wide and deep", "tables", WideDeep, lambda n: {
            "fields": tokens(n, 3), "labels": classes(n, count=2).double()}, click),
        own_case("mlp mixer", "mixer", Mixer, mixed, F.cross_entropy),
        own_case("torch encoder", "torch transformer", Encoder, judged, F.cross_entropy),
        own_case("torch translator", "torch transformer", Translator, translated, next_token),
        own_case("contrast", "pairs", Twins, two),
        own_case("critic", "pairs", Critic, two),
        own_case("policy", "decisions", Policy, steps),
    ]  # fmt: skip
