"""Data: bytes of text as samples by one integer, the global sample index, and what counting bytes alone predicts.

Nothing here has state: sample i of a seed is always the same window, so any chip can fetch any range of indices,
and a run resumes from its step number alone (`training_loop` asks for the samples of a step). Index i falls
into epoch i // windows; an epoch visits every window of the training text once, in an order and with a starting
phase that depend only on (seed, epoch). The hash is SplitMix64 (Steele et al., "Fast splittable pseudorandom number
generators", 2014), spelled out so that no library version can move a sample.

The validation text is a tenth, cut from the end of each of up to 20 equal blocks: it follows the text's changes of
topic, where one tail would test the last topic only, and each piece is one long run, so little of it touches
training text. The default corpus drops paragraphs that occur twice (a fifth of it), since a copy on the other side
of the cut would measure memory. Where pieces are joined, windows run across the seam. The text is held in memory.

An n-gram's probability leans on the shorter one by a Dirichlet prior of strength k (MacKay and Peto, "A
hierarchical Dirichlet language model", 1995, eq. 20): p(x | context) = (count(context x) + k p_shorter(x)) /
(count(context) + k); below the unigram stands the uniform distribution over 256 bytes. Nothing is fitted to the
validation text. Contexts run over the whole text, also where its pieces were joined.
"""

import functools
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comms.errors import DataError
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY
from partitioner.program.program import Program, TensorKind

NUM_BYTES = 256  # the vocabulary: a token is one byte
DEFAULT_SOURCE = "builtin:english"
HOLDOUT = 0.1
MAX_BLOCKS = 20
MIN_PIECE = 1024  # bytes: shorter held-out runs would be mostly seam
SNIFFED_BYTES = 8192  # a file with a zero byte in so many is not text, as git decides
PRIOR_STRENGTH = 10.0  # the best of 0.5 to 20 for trigrams on English text and on source code, 0.4 to 5 MB
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """Training and validation text, read as windows of `seq` inputs and the `seq` bytes that follow each."""

    name: str
    train: Bytes = field(repr=False)
    validation: Bytes = field(repr=False)
    seq: int
    seed: int
    digest: str  # of the whole text: a run resumes only on the same

    @property
    def samples_per_epoch(self) -> int:
        """Training windows until one is seen again."""
        return _num_windows(len(self.train), self.seq)

    @property
    def num_validation_samples(self) -> int:
        """Validation windows; they do not overlap."""
        return (len(self.validation) - 1) // self.seq

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Training samples with these global indices: `input_ids` and `labels`, int64 [len(samples), seq]."""
        indices = np.arange(samples.start, samples.stop, samples.step, dtype=np.int64)
        epochs, places = np.divmod(indices, self.samples_per_epoch)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            windows = _epoch_starts(self.seed, int(epoch), len(self.train), self.seq)
            starts[of_epoch] = windows[places[of_epoch]]
        return _windows(self.train, starts, self.seq)

    def validation_batch(self, samples: range) -> dict[str, Tensor]:
        """Validation windows in text order, starting over past the last one."""
        indices = np.arange(samples.start, samples.stop, samples.step, dtype=np.int64)
        return _windows(self.validation, indices % self.num_validation_samples * self.seq, self.seq)


def load_data(source: str, *, seq: int, seed: int) -> TokenData:
    """The text of `source` (builtin:english, a file, or a folder), cut into training and validation.

    Raises DataError when there is none, or too little for one window on either side of the cut.
    """
    text = _builtin_text(source) if source.startswith("builtin:") else _user_text(Path(source))
    train, validation = split(np.frombuffer(text, dtype=np.uint8))
    if min(len(train), len(validation)) < seq + 1:
        need = round((seq + 1) / HOLDOUT)
        raise DataError(
            problem=f"{len(text)} bytes are too few for sequences of {seq}: a tenth is held out for validation",
            where=source,
            hint=f"give at least {need} bytes, or lower seq",
        )
    return TokenData(source, train, validation, seq, seed, hashlib.sha256(text).hexdigest())


def split(text: Bytes) -> tuple[Bytes, Bytes]:
    """(training, validation): the last tenth of each block is held out."""
    num_blocks = min(max(int(len(text) * HOLDOUT) // MIN_PIECE, 1), MAX_BLOCKS)
    train, validation = [], []
    for block in np.array_split(text, num_blocks):
        cut = len(block) - round(len(block) * HOLDOUT)
        train.append(block[:cut])
        validation.append(block[cut:])
    return np.concatenate(train), np.concatenate(validation)


def _builtin_text(source: str) -> bytes:
    if source != DEFAULT_SOURCE:
        problem, hint = f"unknown data {source!r}", f"use {DEFAULT_SOURCE}, or the path of your own text"
        raise DataError(problem=problem, where="data", hint=hint)
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        problem = "this Python came without pydoc_data, which holds the default text"
        raise DataError(problem=problem, where=source, hint="give your own text with --data") from error
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics[name] for name in sorted(topics)))
    firsts: dict[str, str] = {}
    for paragraph in paragraphs:
        firsts.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(firsts.values()).encode()


def _user_text(path: Path) -> bytes:
    try:
        text = _folder_text(path) if path.is_dir() else path.read_bytes()
    except OSError as error:
        problem = f"cannot read {error.filename or path}: {error.strerror}"
        raise DataError(
            problem=problem, where="data", hint="give the path of a text file or a folder"
        ) from error
    if not text:
        kind = "the folder holds no text files" if path.is_dir() else "the file is empty"
        raise DataError(problem=kind, where=str(path), hint="give a file or folder with text in it")
    return text


def _folder_text(folder: Path) -> bytes:
    """All text files below the folder in order of their paths, hidden ones left out."""
    relative = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    visible = (name for name in relative if not any(part.startswith(".") for part in name.split("/")))
    texts = (folder.joinpath(name).read_bytes() for name in visible)
    return b"\n".join(text for text in texts if text and b"\0" not in text[:SNIFFED_BYTES])


def _windows(text: Bytes, starts: NDArray[np.int64], seq: int) -> dict[str, Tensor]:
    tokens = torch.from_numpy(text[starts[:, None] + np.arange(seq + 1)].astype(np.int64))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _num_windows(length: int, seq: int) -> int:
    """Windows per epoch: one less than would fit, so that the phase has room to move by a whole window."""
    return max((length - 1) // seq - 1, 1)


@functools.lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, length: int, seq: int) -> NDArray[np.int64]:
    """First byte of each window in the order of visit: a permutation, sorted by hash, shifted by a phase."""
    num_windows = _num_windows(length, seq)
    key: Hashes = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    windows: Hashes = np.arange(num_windows, dtype=np.uint64)
    order = np.argsort(_mix(key + windows), kind="stable")
    num_phases = min(length - num_windows * seq, seq)
    phase = int(_mix(~key)[0]) % num_phases
    return order * seq + phase


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's output for each state: a bijection of 64-bit words that leaves no visible pattern."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def step_key(seed: int, step: int) -> int:
    """What random numbers of a step are drawn by, as a signed 64-bit number. Raises DataError."""
    if type(step) is not int:
        raise DataError(f"the step is {step!r}, not a whole number", "steps", "set it to how many were taken")
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


def split_batch(
    batch: Mapping[str, torch.Tensor], program: Program, key: int = 0
) -> dict[int, dict[tuple[int, str], torch.Tensor]]:
    """Cut a global batch along dim 0: {replica: {(microbatch, name): tensor}}.

    Replicas and microbatches take slices in order: any split of the same global batch sees the same sequences. An entry
    that the Program reads as it is goes to all of them whole. `key`: see `step_key`.
    """
    replicas, microbatches = program.size("dp"), program.microbatches
    read = {
        t.source.partition(":")[2]: t.spec.shape for role in program.roles for t in role.tensors
        if t.kind is TensorKind.BATCH
    }  # fmt: skip
    pieces: dict[str, Sequence[torch.Tensor]] = {}
    if FIRST_SAMPLE in read:
        samples = int(program.facts["samples_per_part"])
        batch = {**batch, KEY: torch.tensor(key)}
        pieces[FIRST_SAMPLE] = [torch.tensor(index * samples) for index in range(replicas * microbatches)]
        del read[FIRST_SAMPLE]
    for name, shape in read.items():
        parts = 1 if tuple(batch[name].shape) == shape else replicas * microbatches
        whole = batch[name].contiguous()
        pieces[name] = whole.chunk(parts) if parts > 1 else [whole] * (replicas * microbatches)
        assert all(tuple(piece.shape) == shape for piece in pieces[name]), "the batch does not divide"
    return {
        replica: {
            (microbatch, name): cut[replica * microbatches + microbatch]
            for name, cut in pieces.items()
            for microbatch in range(microbatches)
        }
        for replica in range(replicas)
    }


def baseline_losses(train: NDArray[np.uint8], validation: NDArray[np.uint8]) -> dict[str, float]:
    """Validation loss of each n-gram counted on `train`; cost grows as sorting the training text."""
    longest = max(ORDERS.values())
    assert len(validation) >= longest, "there must be a byte to predict"
    # Every order predicts the same bytes, those that have the longest context before them.
    probability = np.full(len(validation) - longest + 1, 1.0 / NUM_BYTES)
    losses = {}
    for name, order in sorted(ORDERS.items(), key=lambda item: item[1]):
        seen = _occurrences(train, validation[longest - order :], order)
        contexts = _occurrences(train[:-1], validation[longest - order : -1], order - 1)
        probability = (seen + PRIOR_STRENGTH * probability) / (contexts + PRIOR_STRENGTH)
        losses[name] = float(-np.log(probability).mean())
    return losses


def _occurrences(train: NDArray[np.uint8], queries: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """How often each n-gram of `queries` stands in `train`."""
    if order == 0:
        return np.full(len(queries) + 1, len(train) + 1)
    keys, counts = np.unique(_grams(train, order), return_counts=True)
    wanted = _grams(queries, order)
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)


def _grams(text: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """Every run of `order` bytes as one number."""
    num_grams = max(len(text) - order + 1, 0)
    grams = np.zeros(num_grams, np.int64)
    for offset in range(order):
        grams = grams * NUM_BYTES + text[offset : offset + num_grams]
    return grams
