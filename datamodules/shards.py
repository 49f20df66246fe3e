"""The order of samples: which one stands at a position, who reads it, and what happens when it is corrupt.

`stream[position]` is a pure function of (seed, position), where a position counts samples from the start of
training, over all epochs and all ranks. Prefetching, workers and ranks cannot change it, so the one integer
"samples consumed" in a checkpoint is enough to resume exactly, on any number of ranks or workers.
"""

import hashlib
import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

log = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = dict[str, Any]

AHEAD = 2  # batches that each worker reads ahead
TIMEOUT = 1800  # seconds without a batch after which a worker hangs; a shard may have to be fetched first
NEAR = 8  # samples of which one may take the place of one that is corrupt, before others are looked for far away
# Separate random streams of one seed: the order of samples, what is drawn for one, and where others are looked for.
ORDER, DRAWS, FAR = 0, 1, 2


@lru_cache(maxsize=8)  # positions rise, so at most two epochs of a source are in use at a time
def permutation(seed: int, epoch: int, n: int, group: int = -1) -> np.ndarray:
    """An order of `n` things in an epoch: (n,) int64, read-only, a pure function of its arguments.

    `group` names a part of the epoch with an order of its own.
    """
    key = (seed, ORDER, epoch) if group < 0 else (seed, ORDER, epoch, group)
    order = np.random.default_rng(key).permutation(n)
    order.flags.writeable = False
    return order


class Order:
    """Which sample of a source stands at each position of an endless stream over epochs.

    All samples are shuffled together; or, with a `window`, the shards are, and then the samples of each `window`
    successive shards, so that no more than these are open at a time (remote shards, slow disks).
    """

    def __init__(self, seed: int, sizes: Sequence[int], window: int = 0) -> None:
        self.seed, self.window = seed, window if window < len(sizes) else 0
        self.sizes = np.asarray(sizes)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self.n = int(self.starts[-1])

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if not self.window:
            return int(permutation(self.seed, epoch, self.n)[offset])
        shards, ends = self.groups(epoch)
        group = int(np.searchsorted(ends, offset, side="right"))
        first = int(ends[group - 1]) if group else 0
        members = shards[group * self.window : (group + 1) * self.window]
        within = int(permutation(self.seed, epoch, int(ends[group]) - first, group)[offset - first])
        for shard in members:  # few: a window of them
            if within < self.sizes[shard]:
                return int(self.starts[shard]) + within
            within -= int(self.sizes[shard])
        raise AssertionError("an offset lies in its group")

    def groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where each group of them ends."""
        if self._groups is None or self._groups[0] != epoch:
            shards = permutation(self.seed, epoch, len(self.sizes), group=len(self.sizes))
            totals = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.window))
            self._groups = (epoch, shards, np.cumsum(totals))
        return self._groups[1:]

    _groups: tuple[int, np.ndarray, np.ndarray] | None = None


class Mixture:
    """Which source, and which of its positions, stands at a position of a weighted mixture.

    Of every BLOCK positions each source has its share, in an order of their own.
    """

    BLOCK = 1000

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        if any(weight <= 0 for weight in weights):
            raise ValueError(f"The weights {list(weights)} of the sources must be positive.")
        exact = np.asarray(weights) / sum(weights) * self.BLOCK
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact)[: self.BLOCK - counts.sum()]] += 1  # the largest remainders
        if not counts.all():
            raise ValueError(f"A source has less than a thousandth of the weights {list(weights)}.")
        self.seed, self.counts = seed, counts
        self.pattern = np.repeat(np.arange(len(counts)), counts)
        self.earlier = np.concatenate([np.arange(count) for count in counts])  # of the same source in a block

    def __call__(self, position: int) -> tuple[int, int]:
        if len(self.counts) == 1:
            return 0, position
        block, offset = divmod(position, self.BLOCK)
        slot = permutation(self.seed, block, self.BLOCK, group=2**31)[offset]
        source = int(self.pattern[slot])
        return source, block * int(self.counts[source]) + int(self.earlier[slot])

    def before(self, position: int) -> np.ndarray:
        """How many of the positions before this one are of each source: (sources,) int64."""
        block, offset = divmod(position, self.BLOCK)
        slots = permutation(self.seed, block, self.BLOCK, group=2**31)[:offset]
        return block * self.counts + np.bincount(self.pattern[slots], minlength=len(self.counts))


class Positions(Sampler[list[int]]):
    """Endless batches of positions of a rank; step s begins at start + (s * world + rank) * batch.

    `start` may be a function, asked each time an iteration begins: Lightning begins one per epoch, and an
    epoch cut short (`limit_train_batches`) must go on where training stands, not where the process started.
    There is no `__len__`: a wrong length hangs ranks or skips validation.
    """

    def __init__(self, start: int | Callable[[], int], batch: int, rank: int = 0, world: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"The batch size is {batch}; give a whole number of at least 1.")
        if not 0 <= rank < world:
            raise ValueError(f"Rank {rank} does not exist among {world} ranks; give 0 <= rank < world.")
        self.start, self.batch, self.rank, self.world = start, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start() if callable(self.start) else self.start
        for step in count():
            first = start + (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))


class Source(Protocol):
    """Samples by index, in the order of the files. Any exception of `load` marks the sample as corrupt."""

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape (c, ..., h, w) of the uint8 pixels of a sample; () for a source without."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample as "file:key", for messages."""

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        """The sample; what is random in it is drawn from `rng`, what has a schedule looks at `position`."""


class Stream(Dataset[Sample]):
    """The endless shuffled stream of sources: position -> sample, with its failure noted under "skipped".

    A sample that fails to load is replaced, so that batches keep their shape: by the next that loads of the `NEAR`
    that follow, and where these fail too (a shard is lost) by one from elsewhere in the epoch. Noted is the failure at
    the position itself alone: each sample has a position in each epoch, so what is corrupt counts once.
    Raises RuntimeError, with causes and examples, when so many fail in a row that more than the share `max_skipped`
    must be corrupt.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        seed: int,
        max_skipped: float = 0.5,
        weights: Sequence[float] = (1.0,),
        window: int = 0,
        workers: int = 0,
    ) -> None:
        self.sources = list(sources) if isinstance(sources, Sequence) else [sources]
        self.seed = seed
        # The places far away are random: at the share allowed, all are corrupt once in 10^12 times.
        self.patience = NEAR + math.ceil(-12 / math.log10(min(max(max_skipped, 0.5), 0.999)))
        self.mixture = Mixture(seed, weights)
        self.orders = [Order(seed, getattr(source, "sizes", [len(source)]), window) for source in self.sources]
        self.reading = torch.full((workers, 2), -1).share_memory_()  # what each worker is at: (position, attempt)

    def locate(self, position: int, attempt: int = 0) -> tuple[Source, int]:
        """The source of the sample at `position`, or of the one tried after `attempt` others, and its index there."""
        source, within = self.mixture(position + attempt)
        order = self.orders[source]
        if attempt >= NEAR:
            # The same distance for a whole epoch: the neighbours of a lost shard move to another one together.
            epoch, offset = divmod(within, order.n)
            distance = int(np.random.default_rng((self.seed, FAR, epoch, attempt)).integers(order.n))
            within = epoch * order.n + (offset + distance) % order.n
        return self.sources[source], order(within)

    def __getitem__(self, position: int) -> Sample:
        failures: list[tuple[str, str]] = []
        for attempt in range(self.patience):
            self.at(position, attempt)
            source, index = self.locate(position, attempt)
            rng = np.random.default_rng((self.seed, DRAWS, position))
            seed = int(rng.integers(2**63))  # of what training draws for the sample: its noise, on whichever rank it is
            try:
                sample = {**source.load(index, position, rng), "seed": seed, "skipped": failures[:1]}
                self.at(-1)
                return sample
            except Exception as error:  # decoders raise every kind of error; none of them may end a run
                failures.append((source.name(index), describe(error)))
        common = Counter(cause for _, cause in failures).most_common(3)
        causes = "; ".join(f"{n} times: {cause}" for cause, n in common)
        examples = ", ".join(name for name, _ in failures[:3])
        raise RuntimeError(
            f"{self.patience} samples in a row could not be loaded ({causes}), for example {examples}; "
            "check these files and that the data is of the kind this stage expects."
        )

    def at(self, position: int, attempt: int = 0) -> None:
        worker = get_worker_info()
        if worker is not None and len(self.reading):
            self.reading.numpy()[worker.id] = position, attempt


def describe(error: Exception) -> str:
    """The cause of a failure in one line without file names, so that equal causes are counted together."""
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if type(error) is ValueError:  # ours: already a sentence for people
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:200]


def digest(sources: Sequence[Source], settings: Any) -> str:
    """One value for all that decides the order: the keys of samples, the sizes of shards, and settings.

    Folders are not part of it: data may be moved.
    """
    value = hashlib.sha256(repr(settings).encode())
    for source in sources:
        value.update(repr(getattr(source, "sizes", len(source))).encode())
        for index in range(len(source)):
            value.update(source.name(index).rpartition(":")[2].encode(errors="replace") + b"\n")
    return value.hexdigest()[:32]


class Collate:
    """Samples to a batch: tensors stacked along a new first axis, strings listed, failures in one list.

    The colours of a pixel, the first axis of pictures and clips, stay side by side in memory as in the samples.

    Workers do not send pixels but the place where they have put them: memory that they share with this process and
    write anew every few batches. Memory fresh from the system for every batch takes longer to fill than small pictures
    to decode. `receive` copies the pixels out before their place is written again.
    """

    def __init__(self, batch: int = 0, pixels: Sequence[int] = (), workers: int = 0) -> None:
        """pixels: the shape (c, ..., h, w) of a sample's picture or clip."""
        self.turn = 0
        shape = (workers, AHEAD + 1, batch * math.prod(pixels))
        self.shared = torch.empty(shape, dtype=torch.uint8).share_memory_() if pixels and workers else None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        self.turn = (self.turn + 1) % (AHEAD + 1)
        batch: Batch = {"skipped": [failure for sample in samples for failure in sample.get("skipped", [])]}
        for name, first in samples[0].items():
            if name != "skipped":
                values = [sample[name] for sample in samples]
                batch[name] = self.stack(values) if isinstance(first, Tensor) else values
        return batch

    def stack(self, values: list[Tensor]) -> "Tensor | Place":
        if values[0].ndim < 3:
            return torch.stack(values)
        pixels, worker = [value.movedim(0, -1) for value in values], get_worker_info()
        if worker is None or self.shared is None:
            return torch.stack(pixels).movedim(-1, 1)
        place = Place(worker.id, self.turn, (len(pixels), *pixels[0].shape))
        np.stack([value.numpy() for value in pixels], out=self.at(place).numpy())
        return place

    def at(self, place: "Place") -> Tensor:
        assert self.shared is not None
        return self.shared[place.worker, place.turn].view(place.shape)

    def receive(self, batch: Batch) -> Batch:
        """A batch as it came from a worker or this process, with its pixels; in pinned memory where there is a GPU."""
        for name, value in batch.items():
            if isinstance(value, Place):
                value = self.at(value).movedim(-1, 1)
                # Not clone: its threads would wait, spinning, for work that is over.
                value = value.pin_memory() if torch.cuda.is_available() else torch.from_numpy(value.numpy().copy("K"))
            batch[name] = value
        return batch


class Place(NamedTuple):
    """Where in the shared memory a worker has put a batch's pixels."""

    worker: int
    turn: int
    shape: tuple[int, ...]  # (b, ..., h, w, c)


def deaf(worker: int) -> None:
    """Let a worker outlive SIGTERM and SIGUSR1, which schedulers send to every process of a job: training needs it to
    end its step. A second SIGTERM, as a parent sends to a worker that hangs, ends it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Batches:
    """A data loader that Lightning leaves alone.

    Lightning re-creates a `DataLoader` with a distributed sampler of its own when there are several
    ranks. Ours are split already, so it is handed an iterable that is not a `DataLoader`.
    """

    def __init__(self, loader: "DataLoader[Sample]") -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        assert isinstance(self.loader.collate_fn, Collate)
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise RuntimeError(self.stuck()) from None
            yield self.loader.collate_fn.receive(batch)

    def stuck(self) -> str:
        """Which files the workers are at when no batch comes: a decoder in a loop cannot be stopped from within."""
        streams = getattr(self.loader.dataset, "streams", [self.loader.dataset])
        found = [stream.locate(*place) for stream in streams for place in stream.reading.tolist() if place[0] >= 0]
        names = ", ".join(source.name(index) for source, index in found)
        return (
            f"The data workers gave no batch for {TIMEOUT / 60:.0f} minutes; they were reading {names}. A decoder, or "
            "the disk, hangs there: take such a file out of the list; data.changed=true goes on without it."
        )

    @property
    def _iterator(self) -> Any:
        # By this name Lightning finds the workers at the end of a run. Left to the garbage collector, each of
        # them is waited for in vain for five seconds.
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator


class StreamDataModule(LightningDataModule):
    """What the data modules share: a stream's loader, its place in a checkpoint, the count of failures.

    A subclass gives `source()` and `preview_source()`, or `sources()` and their `weights`. The checkpoint holds
    {"consumed": samples trained on, over all ranks; "order": a digest of what decides the order of samples;
    "skipped": failures by cause}; batches that were only fetched ahead do not count. Another order than in the
    checkpoint, or on another rank, is refused.

    max_skipped: the share of samples that may be unreadable before the run stops and says why, of those listed when
    the data are opened, and of those trained on, judged after the first 1,000. window: shards whose samples are
    shuffled together, 0 = all. changed: go on from a checkpoint in another order than it was written in.
    """

    weights: Sequence[float] = (1.0,)

    def __init__(
        self,
        batch_size: int,
        seed: int,
        workers: int,
        max_skipped: float = 0.5,
        window: int = 0,
        changed: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"The batch size is {batch_size}; give a whole number of at least 1.")
        if seed < 0 or workers < 0:
            raise ValueError(f"Seed {seed} and workers {workers} must not be negative; give 0 or more.")
        if window < 0:
            raise ValueError(f"The window is {window} shards; give 0 for all of them, or more.")
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.max_skipped, self.window, self.changed = max_skipped, window, changed
        self.skipped: Counter[str] = Counter()  # failures by cause: of opening, of this rank; after `gather` of all
        self.filtered: Counter[str] = Counter()  # samples that a filter took, by filter
        self._opening: Counter[str] = Counter()  # those of opening and previews, which every rank and run meets anew
        self._seen, self._failed, self._examples = 0, 0, dict[str, str]()
        self._start = 0  # samples consumed when counting began
        self._progress: Any = None  # Lightning's count of batches, from when counting began
        self._processed = 0  # what it stood at then
        self._order = ""  # digest of the order that training follows, or that the checkpoint was written in

    def source(self) -> Source:
        raise NotImplementedError

    def sources(self) -> Sequence[Source]:
        return [self.source()]

    def preview_source(self) -> Source:
        raise NotImplementedError

    @property
    def world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def consumed(self) -> int:
        """Samples trained on so far, over all ranks. Lightning counts a batch as processed before the hook
        `on_train_batch_end`, where checkpoints are written, so the batch just trained is in."""
        if self._progress is None:
            return self._start
        batches = self._progress.total.processed - self._processed
        return self._start + batches * self.batch_size * self.world

    def train_dataloader(self) -> Batches:
        """Endless batches of this rank, from the sample that follows the last one trained on."""
        if self.trainer:
            # Not in load_state_dict: Lightning restores its own counters only after the data module.
            self._start = self.consumed
            self._progress = self.trainer.fit_loop.epoch_loop.batch_progress
            self._processed = self._progress.total.processed
        self.check_order(self.sources())
        loader: DataLoader[Sample] = DataLoader(
            self.dataset(),
            batch_sampler=self.batches(self.trainer.global_rank if self.trainer else 0),
            collate_fn=Collate(self.batch_size, self.sources()[0].pixels, self.workers),
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            worker_init_fn=deaf,
            persistent_workers=self.workers > 0,
            timeout=TIMEOUT if self.workers else 0,
        )
        return Batches(loader)

    def dataset(self) -> Dataset[Sample]:
        return Stream(self.sources(), self.seed, self.max_skipped, self.weights, self.window, self.workers)

    def batches(self, rank: int) -> Sampler[list[Any]]:
        """The positions of each batch of a rank, from where training stands."""
        return Positions(lambda: self.consumed, self.batch_size, rank, self.world)

    def check_order(self, sources: Sequence[Source]) -> None:
        """Raises ValueError where the order of samples is not that of the checkpoint, or not the same on all ranks.

        Each rank opens the data for itself: where one of them, or the run that goes on, finds a shard less, all
        positions hold other samples, and without a word some are repeated and others lost.
        """
        order = digest(sources, (self.seed, self.window, list(self.weights)))
        if self.world > 1 and torch.distributed.is_initialized():
            found: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(found, (order, sum(map(len, sources))))
            if len(set(found)) > 1:
                raise ValueError(
                    f"The ranks found different samples ({', '.join(str(n) for _, n in found)} of them); the warnings "
                    "above name what one of them could not read. Start the run again, with the same data for all."
                )
        if self._order not in ("", order) and not self.changed:
            raise ValueError(
                f"The {sum(map(len, sources))} samples found, or their order, are not those of the checkpoint: a shard "
                "is missing or new, or data.filters, weights, window or the seed changed. Put that right, or set "
                "data.changed=true to go on with them; the epoch then repeats some samples and loses others."
            )
        self._order = order

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "order": self._order, "skipped": dict(self.skipped - self._opening)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start, self._progress = int(state_dict["consumed"]), None
        self._order = state_dict.get("order", "")
        if not self.trainer or self.trainer.is_global_zero:  # they are of all ranks together
            self.skipped += Counter(state_dict.get("skipped", {}))

    def gather(self) -> None:
        """Brings the counts of failures of all ranks together in the first. All ranks must call it."""
        if self.world > 1 and torch.distributed.is_initialized():
            found: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(found, (self.skipped - self._opening, self._examples))
            self.skipped = self._opening.copy()
            if self.trainer and self.trainer.is_global_zero:
                for skipped, examples in found:
                    self.skipped += skipped
                    self._examples = {**examples, **self._examples}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes the failures out of the batch and counts them.

        Raises RuntimeError, with causes and examples, when more than `max_skipped` of the samples failed.
        """
        if isinstance(batch, dict) and "skipped" in batch:
            failures = batch.pop("skipped")
            self.note(failures)
            self._failed += len(failures)
            self._seen += len(batch.get("key", ()))
            if self._seen >= 1000 and self._failed > self.max_skipped * self._seen:
                raise RuntimeError(
                    f"{self._failed} of {self._seen} samples could not be read, more than data.max_skipped="
                    f"{self.max_skipped} allows. {self.worst()}."
                )
        return batch

    def note(self, failures: Sequence[tuple[str, str]], opening: bool = False) -> None:
        """Counts failures by cause, with one line in the log for a cause not seen before."""
        self._opening.update(cause for _, cause in failures if opening)
        for name, cause in failures:
            if cause not in self._examples:
                log.warning("Skipped %s: %s. Others like it are only counted.", name, cause)
                self._examples[cause] = name
            self.skipped[cause] += 1

    def note_opening(self, problems: Sequence[tuple[str, str]], used: set[str], samples: int) -> None:
        """Counts what was left out when the data were opened: `samples` are left, in the shards `used`.

        Raises ValueError, with causes and examples, when it is more than `max_skipped` of the shards or of the samples.
        """
        self.note(problems, opening=True)
        damaged = {name for name, _ in problems if name.split("?")[0].endswith(".tar")}
        single = sum(name not in damaged for name, _ in problems)
        shards = (len(damaged - used), len(damaged | used), "shards")  # a truncated one may still be used
        for n, total, kind in (shards, (single, single + samples, "listed samples")):
            if n > self.max_skipped * total:
                raise ValueError(
                    f"{n} of {total} {kind} could not be read, more than data.max_skipped={self.max_skipped} "
                    f"allows. {self.worst()}."
                )

    def worst(self) -> str:
        """The most common causes of failures so far, each with an example."""
        causes = [(n, cause, self._examples.get(cause)) for cause, n in self.skipped.most_common(3)]
        return "; ".join(f"{n} times: {cause}" + (f" (as in {name})" if name else "") for n, cause, name in causes)

    def preview(self, n: int) -> Batch:
        """The first `n` samples that load, in the order of the files and always drawn alike: for grids."""
        source = self.preview_source()
        samples: list[Sample] = []
        for index in range(len(source)):
            if len(samples) == n:
                break
            try:
                samples.append(source.load(index, 0, np.random.default_rng((0, DRAWS, index))))
            except Exception as error:
                self.note([(source.name(index), describe(error))], opening=True)
        if not samples:
            raise ValueError("No sample could be loaded for a preview; the warnings above name the causes.")
        return self.on_before_batch_transfer(Collate()(samples), 0)
