"""Own data: batches from datasets and loaders of the user's, by the number of the step alone.

A dataset (`__len__` and `__getitem__`) is cut into batches here: every pass over it in an order of its own, that of the
seed and the pass, or as it lies; samples are put together by torch's default collation. What is only iterated gives
samples too, a `DataLoader` batches as they are. Whatever draws random numbers while samples are made draws them from
(seed, step) in a dataset, from (seed, pass) in a stream; the rest of the process sees nothing of it.

A resumed run goes on where it was: a dataset by index, a stream by reading what comes before. A pass may end with a
batch of fewer samples: it is given as it is, or left out with `drop_last`. Not known: whether what the user's code
reads has changed, beyond the first batch.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias
from weakref import proxy

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as trees
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from comms.errors import DataError
from orchestrator.config.job_file import Gives
from orchestrator.models.random_state import (
    RandomState,
    random_state,
    random_state_restored,
    set_random_state,
)
from orchestrator.models.user_code import RAISED, raised
from orchestrator.runs.data import step_key
from partitioner.capture.batch_inputs import settings_of, tensors_of

Named: TypeAlias = dict[str, Any]
Namer: TypeAlias = Callable[[object], Named]  # of what a dataset or loader gives, the model's entries by name
ANEW = "give an iterable that starts anew each time, or fewer steps"


@dataclass(frozen=True)
class Passes:
    """What a function gives that returns an iterator: it is called anew for each pass."""

    make: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        made: Iterator[Any] = self.make()
        return made


def passes(make: Callable[[], Any]) -> Any:
    """What a function makes, to be read as often as there are passes."""
    made = make()
    return Passes(make) if isinstance(made, Iterator) else made


@dataclass(frozen=True, slots=True)
class Reading:
    """How data is read: samples a batch, what draws it, in which order, what becomes of a smaller last batch."""

    samples: int
    seed: int
    dtype: torch.dtype  # of what is no whole number
    shuffle: bool = True
    drop_last: bool = False
    gives: Gives | None = None  # None: loaders batches, all else samples


@dataclass(eq=False)
class OwnData:
    """Batches by step; `parts` as many as a batch must divide into, if that is known."""

    name: str
    source: Any
    reading: Reading
    named: Namer
    parts: int = 1
    digest: str = ""
    _read: int = 0  # batches that the stream has given
    _stream: Iterator[Named] | None = None
    _kept: tuple[int, Named] | None = field(default=None)
    _is_begun: bool = False

    def __post_init__(self) -> None:
        self.source = _in_torch_format(_opened(self.source, self.name))
        if not self.is_indexed and not hasattr(self.source, "__iter__"):
            raise DataError(f"{self.name} gives a {type(self.source).__name__}", "data",
                            "give a dataset, an iterable of samples, or a DataLoader")  # fmt: skip
        size = getattr(self.source, "batch_size", None) if self.is_loader else None
        if size is not None and size != self.reading.samples:
            raise DataError(f"the batches of {self.name} have {size} samples, global_batch is {self.reading.samples}",
                            "data", f"take --global-batch {size}, or another batch_size")  # fmt: skip
        with self._explaining():
            held = len(self.source) if self.is_indexed else self.reading.samples
        if held < self.reading.samples:
            hint = f"take --global-batch {held}, or give more" if held else "give samples to train on"
            problem = f"{self.name} has {held} samples, global_batch is {self.reading.samples}"
            raise DataError(problem, "data", hint)
        first = self.batch(0)
        if not (found := num_samples(first)):
            hint = "give tensors with a row per sample"
            raise DataError(f"the first batch of {self.name} holds no samples", "data", hint)
        if found != self.reading.samples:
            problem = f"the first batch of {self.name} has {found} samples"
            raise DataError(f"{problem}, global_batch is {self.reading.samples}", "data",
                            f"take --global-batch {found}, or batches of {self.reading.samples}")  # fmt: skip
        self.digest = self._digest(first)

    @property
    def is_loader(self) -> bool:
        """Whether batches come as they are."""
        if self.reading.gives is not None:
            return self.reading.gives is Gives.BATCHES
        return isinstance(self.source, DataLoader) or all(
            hasattr(self.source, n) for n in ("dataset", "batch_size")
        )

    @property
    def is_indexed(self) -> bool:
        """Whether samples are found by number."""
        is_map = all(hasattr(self.source, n) for n in ("__len__", "__getitem__"))
        return is_map and not self.is_loader and not isinstance(self.source, IterableDataset)

    @property
    def batches_per_pass(self) -> int | None:
        """Of a dataset or loader; None for what does not say."""
        if not self.is_indexed:
            return _length(self.source) if self.is_loader else None
        whole, rest = divmod(len(self.source), self.reading.samples)
        return whole + (rest > 0 and not self.reading.drop_last)

    def batch(self, step: int) -> Named:
        """The batch of a step, from 0. Raises DataError, and ModelError for what the user's code raises."""
        if self._kept is not None and self._kept[0] == step:
            return self._kept[1]
        made = self._indexed(step) if self.is_indexed else self._streamed(step)
        found = _placed(made, self.reading.dtype, self.name)
        self._require_fit(found, step)
        self._kept = (step, found)
        return found

    def position(self, step: int) -> int:
        """How many samples were read before a step, as far as batches are whole."""
        per_pass = self.batches_per_pass
        if per_pass is None or not self.is_indexed:
            return step * self.reading.samples
        passes, rest = divmod(step, per_pass)
        used = min(per_pass * self.reading.samples, len(self.source))
        return passes * used + rest * self.reading.samples

    def require_parts(self, parts: int) -> None:
        """Refuse, before anything is trained, a last batch that does not divide into so many."""
        self.parts = parts
        counted = self.source if self.is_indexed else getattr(self.source, "sampler", None)
        is_sized = self.is_loader and getattr(self.source, "batch_size", None)
        is_cut = self.is_indexed or (is_sized and not getattr(self.source, "drop_last", False))
        rest = (_length(counted) or 0) % self.reading.samples if is_cut else 0
        if rest % parts and not self.reading.drop_last:
            raise self._unfit(rest)

    def _require_fit(self, batch: Named, step: int) -> None:
        found = num_samples(batch)
        if found > self.reading.samples:
            problem = (
                f"the batch of step {step + 1} has {found} samples, global_batch is {self.reading.samples}"
            )
            raise DataError(problem, self.name, "give batches of one size; the last of a pass may be smaller")
        if found % self.parts:
            raise self._unfit(found)

    def _unfit(self, samples: int) -> DataError:
        problem = (
            f"a last batch of {samples} samples does not divide into {self.parts} parts (dp x microbatches)"
        )
        return DataError(problem, self.name, "set drop_last=true, or a global_batch that leaves no such rest")

    def _indexed(self, step: int) -> Named:
        per_pass, size = self.batches_per_pass or 1, self.reading.samples
        number, place = divmod(step, per_pass)
        order = self._order(number)[place * size : (place + 1) * size]
        with drawing(step_key(self.reading.seed, step)), self._explaining():
            numbers = [int(index) for index in order]
            at_once = getattr(self.source, "__getitems__", None)  # as a DataLoader does
            samples = at_once(numbers) if at_once else [self.source[number] for number in numbers]
        return self.named(_collated(samples, self.name))

    def _order(self, number: int) -> Sequence[int]:
        """The samples of a pass, in order."""
        length = len(self.source)
        if not self.reading.shuffle:
            return range(length)
        generator = torch.Generator().manual_seed(step_key(self.reading.seed, number) % 2**63)
        order: list[int] = torch.randperm(length, generator=generator).tolist()
        return order

    def _streamed(self, step: int) -> Named:
        if self._stream is None or step < self._read:
            self._read, self._stream = 0, OwnData._passes(proxy(self))
        while True:
            found = next(self._stream)
            self._read += 1
            if self._read > step:
                return found

    def _passes(self) -> Iterator[Named]:
        """Batches, pass after pass. `self` is a proxy: a loader's workers end with who reads, not with cycles."""
        number = 0
        while True:
            begun = self._read
            smaller: list[Named] = []  # held back, as nothing may follow it
            for value in OwnData._pass(self, number):
                yield from smaller
                found = self.named(value)
                is_smaller = num_samples(found) < self.reading.samples
                smaller = [found] if is_smaller and self.reading.drop_last else []
                if not smaller:
                    yield found
            if self._read == begun:
                problem = (
                    f"the data ended after {self._read} batches" if self._read else "there are no samples"
                )
                raise DataError(problem, self.name, ANEW if self._read else "give samples to train on")
            number += 1

    def _pass(self, number: int) -> Iterator[object]:
        with drawing(step_key(self.reading.seed, number)) as state, self._explaining():
            values = iter(self.source)
            _keep(state)
        if values is self.source and self._is_begun:
            raise DataError("the data can be iterated only once", self.name, ANEW)
        self._is_begun = True
        while True:
            with _resumed(state), self._explaining():
                taken = list(islice(values, 1 if self.is_loader else self.reading.samples))
            if not taken:
                return
            if not self.is_loader:
                self._require_samples(taken[0])
            yield taken[0] if self.is_loader else _collated(taken, self.name)

    def _require_samples(self, value: object) -> None:
        """Refuse what an iterable gives if it may as well be a batch: nothing else tells them apart."""
        if self.reading.gives or isinstance(self.source, Dataset) or hasattr(self.source, "with_format"):
            return
        lengths = [v.shape[0] if v.dim() else 0 for v in trees.tree_leaves(value) if isinstance(v, Tensor)]
        if lengths and set(lengths) == {self.reading.samples}:
            problem = f"all that {self.name} gives one by one has {lengths[0]} rows, as many as global_batch"
            hint = "say whether these are batches or samples: data_gives=batches or data_gives=samples"
            raise DataError(problem, "data", hint)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except RAISED as error:
            raise raised(error, self.name, "data") from error

    def _digest(self, first: Named) -> str:
        said = f"{self.name} {self.reading} {self.batches_per_pass} {digest_of(first)}"
        return hashlib.sha256(said.encode()).hexdigest()


def digest_of(*batches: Mapping[str, Any]) -> str:
    """Of all that batches hold, bit for bit."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(settings_of(batch)).encode())
        for name, value in tensors_of(batch).items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def num_samples(batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds: the length that most of its tensors have."""
    lengths = [v.shape[0] for v in tensors_of(batch).values() if v.dim()]
    return max(lengths, key=lambda n: (lengths.count(n), n), default=0)


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # streams have none
        return None


def _opened(source: Any, name: str) -> Any:
    if isinstance(source, Mapping):
        known = ", ".join(map(str, source))
        raise DataError(f"{name} gives a mapping of {known}", "data", "return one of its datasets")
    return source


def _in_torch_format(source: Any) -> Any:
    """A dataset of Hugging Face that gives Python's numbers is asked for tensors."""
    kind = (getattr(source, "format", None) or {}).get("type") if hasattr(source, "with_format") else "torch"
    return source if kind is not None else source.with_format("torch")


def _collated(samples: Sequence[object], name: str) -> object:
    try:
        return default_collate(list(samples))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())[:160]
        raise DataError(f"samples cannot be put together to a batch: {said}", name,
                        "make them alike, or give a DataLoader with a collate_fn") from error  # fmt: skip


def _placed(batch: Named, dtype: torch.dtype, name: str) -> Named:
    """The batch with its floating-point numbers in the job's dtype. Raises DataError for arrays and sparse tensors."""
    for path, value in trees.tree_flatten_with_path(batch)[0]:
        entry = trees.keystr(path).strip("[']")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise DataError(f"entry {entry} of a batch is sparse", name, "make it dense: to_dense()")
        if isinstance(value, Tensor) and value.is_meta:
            raise DataError(
                f"entry {entry} of a batch is on the meta device, without numbers", name, "make it on the CPU"
            )
        if isinstance(value, np.ndarray | np.generic):
            raise DataError(f"entry {entry} of a batch is of numpy, which PyTorch's operations do not take", name,
                            "give tensors: torch.from_numpy in the collate_fn")  # fmt: skip
    found: Named = trees.tree_map_only(
        Tensor, lambda t: t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype), batch
    )
    return found


@contextmanager
def drawing(seed: int) -> Iterator[list[RandomState]]:
    """Random numbers follow from a seed inside the block; gives a place for the state that they are left in."""
    with random_state_restored():
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield []


def _keep(state: list[RandomState]) -> None:
    state[:] = [random_state()]


@contextmanager
def _resumed(state: list[RandomState]) -> Iterator[None]:
    """Random numbers go on from a state, which is left where they end."""
    with random_state_restored():
        set_random_state(state[0])
        yield
        _keep(state)
