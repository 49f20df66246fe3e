"""The order of joint image-video training: batches of clips, and in a set share of their places batches of pictures."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

from torch.utils.data import Dataset, Sampler

from datamodules.shards import Mixture, Sample

Place = tuple[int, int]  # a stream, and a position in it


class Streams(Dataset[Sample]):
    """Several streams side by side: (stream, position) -> sample."""

    def __init__(self, *streams: Dataset[Sample]) -> None:
        self.streams = streams

    def __getitem__(self, place: Place) -> Sample:
        stream, position = place
        return self.streams[stream][position]


class Turns(Sampler[list[Place]]):
    """Endless batches of a rank, each of one stream: batch n of the stream that `mixture` has at n, on every rank.

    All ranks take turns together, so that none waits for another's clips over its own pictures, and all have gradients
    for the same parameters. `start` is asked, each time an iteration begins, for the number of the next batch and each
    stream's next position; `sizes` are the samples of a batch of each stream.
    """

    def __init__(
        self,
        mixture: Mixture,
        start: Callable[[], tuple[int, Sequence[int]]],
        sizes: Sequence[int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mixture, self.start, self.sizes, self.rank, self.world = mixture, start, sizes, rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        batch, positions = self.start()
        following = list(positions)
        for number in count(batch):
            stream, _ = self.mixture(number)
            size = self.sizes[stream]
            first = following[stream] + self.rank * size
            following[stream] += self.world * size
            yield [(stream, position) for position in range(first, first + size)]
