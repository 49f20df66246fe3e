"""The order of samples: which one stands at a position, who reads it, and what happens when it is corrupt.

`stream[position]` is a pure function of (seed, position), where a position counts samples from the start of
training, over all epochs and all ranks. Prefetching, workers and ranks cannot change it, so the one integer
"samples consumed" in a checkpoint is enough to resume exactly, on any number of ranks or workers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

log = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = dict[str, Any]

ORDER, DRAWS = 0, 1  # separate random streams of one seed: the order of samples, and what is drawn within one


@lru_cache(maxsize=2)  # positions rise, so at most two epochs are in use at a time
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` samples in an epoch: (n,) int64, read-only, a pure function of its arguments."""
    order = np.random.default_rng((seed, ORDER, epoch)).permutation(n)
    order.flags.writeable = False
    return order


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

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample as "file:key", for messages."""

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        """The sample; what is random in it is drawn from `rng`, what has a schedule looks at `position`."""


class Stream(Dataset[Sample]):
    """The endless shuffled stream of a source: position -> sample, with failures noted under "skipped".

    A sample that fails to load is replaced by the one at the next position, so that batches keep their
    shape. Raises RuntimeError, with causes and examples, when `patience` samples in a row fail.
    """

    def __init__(self, source: Source, seed: int, patience: int = 32) -> None:
        self.source, self.seed, self.patience = source, seed, patience

    def index(self, position: int) -> int:
        """The index, in the source, of the sample at `position`."""
        epoch, offset = divmod(position, len(self.source))
        return int(permutation(self.seed, epoch, len(self.source))[offset])

    def __getitem__(self, position: int) -> Sample:
        skipped: list[tuple[str, str]] = []
        for attempt in range(self.patience):
            index = self.index(position + attempt)
            rng = np.random.default_rng((self.seed, DRAWS, position))
            try:
                return {**self.source.load(index, position, rng), "skipped": skipped}
            except Exception as error:  # decoders raise every kind of error; none of them may end a run
                skipped.append((self.source.name(index), describe(error)))
        common = Counter(cause for _, cause in skipped).most_common(3)
        causes = "; ".join(f"{n} times: {cause}" for cause, n in common)
        examples = ", ".join(name for name, _ in skipped[:3])
        raise RuntimeError(
            f"{self.patience} samples in a row could not be loaded ({causes}), for example {examples}; "
            "check these files and that the data is of the kind this stage expects."
        )


def describe(error: Exception) -> str:
    """The cause of a failure in one line without file names, so that equal causes are counted together."""
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if type(error) is ValueError:  # ours: already a sentence for people
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:200]


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a batch: tensors stacked along a new first axis, strings listed, failures in one list."""
    batch: Batch = {"skipped": [failure for sample in samples for failure in sample.get("skipped", [])]}
    for name, first in samples[0].items():
        if name != "skipped":
            values = [sample[name] for sample in samples]
            batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


class Batches:
    """A data loader that Lightning leaves alone.

    Lightning re-creates a `DataLoader` with a distributed sampler of its own when there are several
    ranks. Ours are split already, so it is handed an iterable that is not a `DataLoader`.
    """

    def __init__(self, loader: "DataLoader[Sample]") -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

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

    A subclass gives `source()` and `preview_source()`. The checkpoint holds {"consumed": samples trained
    on, over all ranks}; batches that were only fetched ahead do not count.
    """

    def __init__(self, batch_size: int, seed: int, workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"The batch size is {batch_size}; give a whole number of at least 1.")
        if seed < 0 or workers < 0:
            raise ValueError(f"Seed {seed} and workers {workers} must not be negative; give 0 or more.")
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.skipped: Counter[str] = Counter()
        self._start = 0  # samples consumed when counting began
        self._progress: Any = None  # Lightning's count of batches, from when counting began
        self._processed = 0  # what it stood at then

    def source(self) -> Source:
        raise NotImplementedError

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
        rank = self.trainer.global_rank if self.trainer else 0
        loader: DataLoader[Sample] = DataLoader(
            Stream(self.source(), self.seed),
            batch_sampler=Positions(lambda: self.consumed, self.batch_size, rank, self.world),
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        return Batches(loader)

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start, self._progress = int(state_dict["consumed"]), None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes the failures out of the batch and counts them."""
        if isinstance(batch, dict):
            self.note(batch.pop("skipped", []))
        return batch

    def note(self, failures: Sequence[tuple[str, str]]) -> None:
        """Counts failures by cause, with one line in the log for a cause not seen before."""
        for name, cause in failures:
            if cause not in self.skipped:
                log.warning("Skipped %s: %s. Others like it are only counted.", name, cause)
            self.skipped[cause] += 1

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
                self.note([(source.name(index), describe(error))])
        if not samples:
            raise ValueError("No sample could be loaded for a preview; the warnings above name the causes.")
        return self.on_before_batch_transfer(collate(samples), 0)
