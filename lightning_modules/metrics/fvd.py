"""Frechet Video Distance (arXiv 1812.01717): how far two sets of clips lie apart in the eyes of I3D.

Preprocessing is the reference's: bytes, bilinear to 224x224 without keeping the aspect, 2x / 255 - 1;
features are the 400 logits averaged over time. The number falls as the sets grow, so compare only equal
numbers of clips.
"""

from torch import Tensor

from lightning_modules.metrics.distances import frechet_distance, frechet_influences
from lightning_modules.metrics.i3d import I3DMetric


class FrechetVideoDistance(I3DMetric):
    """FVD of generated clips against real ones; lower is better. "fvd" with the published weights, see `I3DMetric`."""

    measure, kind, least = "fvd", "frechet", 0.0

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; ValueError where there are fewer than two clips of a kind."""
        self.need()
        return frechet_distance(self.rows("real"), self.rows("fake"))

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        self.need()
        return frechet_influences(self.rows("real"), self.rows("fake"))
