"""Video inception score: are clips each clearly of one class, and together of many, in the eyes of C3D."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.metrics.video_metric import VideoMetric, check_videos, exact
from lightning_modules.metrics.weights import RANDOM, load_dict, located
from models.c3d import C3D, CLASSES, CUBE, FRAMES, SIDE, convert_keys, prepare, random_c3d

RESIZE = f"bilinear to {SIDE}x{SIDE}, aspect not kept, align_corners=True"


def arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, read without running code; ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: torch.from_numpy(np.asarray(file[key], dtype=np.float32)) for key in file.files}
    except (ValueError, OSError, EOFError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file of arrays; it may be cut short.") from error


def load_c3d(path: Path) -> C3D:
    """tgan2's conv3d_deepnetA_ucf.npz, or a dictionary of the same weights that torch saved."""
    weights = convert_keys(arrays(path) if path.suffix == ".npz" else load_dict(path))
    with torch.device("meta"):
        net = C3D()
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of C3D: its entries do not fit.") from error
    return net.requires_grad_(False)


def load_mean(path: Path) -> Tensor:
    """tgan2's mean2.npz: the mean cube (3, 16, 128, 171) under "mean"."""
    mean = arrays(path).get("mean")
    if mean is None or mean.numel() != torch.Size(CUBE).numel():
        raise ValueError(f"{path} does not hold the mean cube of C3D, {CUBE} under the name 'mean'.")
    return mean.view(CUBE)


def kl_divergences(probabilities: Tensor) -> Tensor:
    """KL of each row of class probabilities (n, c) from their mean, with tgan2's 1e-20; float64 (n,)."""
    p = probabilities.double() + 1e-20
    return (p * (p.log() - p.mean(0).log())).sum(1)


class VideoInceptionScore(VideoMetric):
    """IS of generated clips of 16 frames, exp of the mean KL(p(class | clip) || p(class)); higher is better.

    The mean of `splits` scores, as the clips are shuffled by `seed` and dealt to them; `summary` has their deviation.
    More clips in a split score higher: print n and splits. Which clip is in which split depends on what the network
    makes of it, never on the order or the rank it came in.

    `weights` is tgan2's conv3d_deepnetA_ucf.npz and `mean` its mean2.npz, by path or address, each with a SHA-256 that
    is checked where given; the name is then "is". Without them the network is random with a fixed seed and the name
    is "is_random". `chunk` clips run at a time.
    """

    kinds = ("fake",)
    higher_is_better = True
    least = 1.0

    fake: list[Tensor]
    n_fake: Tensor
    network: nn.Module

    def __init__(
        self,
        weights: str | Path | None = None,
        sha256: str | None = None,
        splits: int = 10,
        seed: int = 42,
        mean: str | Path | None = None,
        mean_sha256: str | None = None,
        chunk: int = 8,
    ):
        super().__init__()
        if splits < 1:
            raise ValueError(f"An inception score has at least one split, not {splits}.")
        if (weights is None) != (mean is None):
            raise ValueError("C3D needs both its weights and its mean cube, or neither for a random network.")
        if weights is None and (sha256 or mean_sha256):
            raise ValueError("A SHA-256 was given without the weight file it belongs to.")
        self.name = "is_random"
        self.digests: tuple[str, str] | None = None
        cube: Tensor | None = None
        if weights is None or mean is None:
            network = random_c3d()
        else:
            path, digest = located(weights, sha256, "C3D")
            mean_path, mean_digest = located(mean, mean_sha256, "C3D mean")
            network, cube = load_c3d(path), load_mean(mean_path)
            self.name, self.digests = "is", (digest, mean_digest)
        object.__setattr__(self, "network", network)  # past nn.Module's registration
        self.cube, self.splits, self.seed, self.chunk = cube, splits, seed, chunk
        self.add_rows("fake", CLASSES)

    def update(self, videos: Tensor) -> None:
        """Adds uint8 (b, 3, 16, h, w) clips, 0..255; ValueError for floats, another shape or length, or mixed sizes."""
        check_videos(videos)
        if videos.shape[2] != FRAMES:
            raise ValueError(f"C3D takes clips of {FRAMES} frames, and these have {videos.shape[2]}.")
        self.note(videos, "fake")
        self.fake.append(self.probabilities(videos))

    def probabilities(self, videos: Tensor) -> Tensor:
        """p(class | clip) (b, 101), float32 even under autocast."""
        net = self.network.to(self.device)
        cube = self.cube if self.cube is None else self.cube.to(self.device)
        with exact(self.device):
            parts = [net(prepare(clips.to(self.device), cube)).softmax(1) for clips in videos.split(self.chunk)]
        return torch.cat(parts)

    def divergences(self) -> list[Tensor]:
        """KL divergences of the clips of each split."""
        self.need(2 * self.splits)
        rows = self.rows("fake")
        rows = rows[(rows.double() @ torch.arange(1.0, CLASSES + 1, device=rows.device).double()).argsort()]
        order = torch.from_numpy(np.random.RandomState(self.seed).permutation(len(rows))).to(rows.device)
        n, k = len(rows), self.splits
        return [kl_divergences(rows[order[i * n // k : (i + 1) * n // k]]) for i in range(k)]

    def scores(self) -> Tensor:
        """The score of each split."""
        return torch.stack([kl.mean() for kl in self.divergences()]).exp()

    def compute(self) -> Tensor:
        """The mean over splits, a float64 scalar; ValueError where there are fewer than two clips for each."""
        return self.scores().mean()

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        # the derivative of a split's mean KL by a clip's weight: the change of p(class) adds nothing to first order
        parts = [kl.mean().exp() * (kl - kl.mean()) / len(kl) / self.splits for kl in self.divergences()]
        return self.scores().mean(), [torch.cat(parts)]

    def details(self) -> dict[str, Any]:
        enough = int(self.n_fake) >= 2 * self.splits
        weights = RANDOM if self.digests is None else "sha256:{}, mean cube sha256:{}".format(*self.digests)
        return {
            "splits": self.splits,
            "deviation": float(self.scores().std(correction=0)) if enough else None,
            "resize": RESIZE,
            "weights": weights,
        }
