"""Kernel Video Distance: the unbiased MMD of I3D's logits, which needs no Gaussians and is right for few clips."""

from torch import Tensor

from lightning_modules.metrics.distances import kernel_distance
from lightning_modules.metrics.i3d import I3DMetric


class KernelVideoDistance(I3DMetric):
    """KVD, MMD^2 with the kernel (x.y / 400 + 1)^3; lower is better, and near zero it may be negative.

    "kvd" with the published weights, see `I3DMetric`.
    """

    measure, kind = "kvd", "kernel"

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; ValueError where there are fewer than two clips of a kind."""
        return self.influences()[0]

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        self.need()
        return kernel_distance(self.rows("real"), self.rows("fake"))
