"""Inception-v3 as the FID knows it: TensorFlow's graph of 2015-12-05, whose pools differ from torchvision's.

The weights were ported to torchvision's layout of keys (mseitzer/pytorch-fid), so torchvision's class holds them; what
TensorFlow does otherwise stands here: average pools leave padding out of the count, and the last block has a max-pool.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as tv

SIDE, WIDTH = 299, 2048


def average(block: tv.InceptionA | tv.InceptionC | tv.InceptionE, x: Tensor, branches: list[Tensor]) -> list[Tensor]:
    """The branches with the pooled one, the last, made anew; it is a small part of a block's work."""
    pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    return [*branches[:-1], block.branch_pool(pooled)]


class BlockA(tv.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return average(self, x, super()._forward(x))


class BlockC(tv.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return average(self, x, super()._forward(x))


class BlockE(tv.InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return average(self, x, super()._forward(x))


class LastBlock(tv.InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]


class Inception(tv.Inception3):
    """Images (n, 3, 299, 299), float in [-1, 1], to pooled features (n, 2048).

    Without the classifier of 1,008 classes, `fc`. Starts in evaluation mode.
    """

    def __init__(self) -> None:
        blocks = [tv.BasicConv2d, BlockA, tv.InceptionB, BlockC, tv.InceptionD, BlockE, tv.InceptionAux]
        super().__init__(aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c = LastBlock(2048)
        self.fc = nn.Identity()  # forward ends in the features
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"Inception takes images of shape (n, 3, {SIDE}, {SIDE}), not {tuple(x.shape)}.")
        return super().forward(x)


def random_inception(seed: int = 0) -> Inception:
    """Inception with random weights that depend on `seed` alone, by He's initialisation, as `random_i3d` has them."""
    with torch.random.fork_rng(devices=[]):  # constructing draws from the global generator
        net = Inception()
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
    return net
