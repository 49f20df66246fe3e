"""How much a clip moves, and whether it is motion: two numbers of its pixels that need no network (Ours)."""

import torch
from torch import Tensor

from lightning_modules.metrics.video_metric import VideoMetric, check_videos


class Motion(VideoMetric):
    """The mean absolute difference of successive frames, in grey levels of 0..255, mean over clips.

    Beside it stands the correlation over time: of a difference of frames with the next one, over all pixels and
    channels. A thing that goes on moving changes the same pixels alike, so it is above that of flicker: frames that
    have nothing to do with each other have -1/2, as each is in two differences with opposite signs, and things that
    come and go at once have less than 0. A still clip has motion 0, and its correlation counts as 0.
    """

    kinds = ("fake",)
    name = "motion"
    higher_is_better = None

    fake: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("fake", 2)  # motion and correlation of each clip

    def update(self, videos: Tensor) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255, f >= 3. Raises ValueError as the other metrics do."""
        check_videos(videos, 3)
        self.note(videos, "fake")
        change = videos.float().diff(dim=2)
        before, after = change[:, :, :-1].flatten(1), change[:, :, 1:].flatten(1)
        norms = before.norm(dim=1) * after.norm(dim=1)
        # No mean is taken out of the differences: a change of brightness of all pixels is motion too.
        correlation = torch.where(norms > 0, (before * after).sum(1) / norms.clamp(min=1e-12), 0.0)
        self.fake.append(torch.stack((change.abs().flatten(1).mean(1), correlation), 1).to(self.device))

    def compute(self) -> Tensor:
        """The mean difference, a float64 scalar; ValueError before the first clip."""
        self.need(1)
        return self.rows("fake")[:, 0].double().mean()

    def correlation(self) -> Tensor:
        """The mean correlation over time, -1..1, a float64 scalar; ValueError before the first clip."""
        with self.gathered():
            self.need(1)
            return self.rows("fake")[:, 1].double().mean()

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        scores = self.rows("fake")[:, 0].double()
        return self.compute(), [scores / len(scores)]
