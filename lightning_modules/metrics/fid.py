"""Frechet distances between the frames of two sets of clips: FID by Inception-v3, and CLIP-FID."""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_modules.metrics.distances import Moments, frechet_of_moments, moment_influences
from lightning_modules.metrics.video_metric import CLIP_RESIZE, VideoMetric, check_videos, exact
from lightning_modules.metrics.weights import load_dict, located, need_file, told
from models.inception import SIDE, WIDTH, Inception, random_inception

# pt_inception-2015-12-05-6726825d.pth of mseitzer/pytorch-fid, which torch-fidelity carries under another name.
INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KEPT = 512  # clips whose frame features are kept for the interval
RESIZE = {
    "bilinear": "bilinear to 299x299, aspect not kept, align_corners=False, no antialiasing (pytorch-fid)",
    "tensorflow": "bilinear to 299x299, aspect not kept, as TensorFlow 1 samples, no antialiasing (torch-fidelity)",
    "antialias": "bilinear to 299x299, aspect not kept, align_corners=False, antialiased (torchmetrics)",
}


def prepare(frames: Tensor, resize: str) -> Tensor:
    """uint8 (n, 3, h, w) to float (n, 3, 299, 299) in [-1, 1]; `resize` as in RESIZE."""
    x = frames.float()
    if resize == "tensorflow":  # output pixel i is at input i * size / 299, without half a pixel
        for dim in (2, 3):
            at = torch.arange(SIDE, device=x.device) * (x.shape[dim] / SIDE)
            low = at.floor().long().clamp(max=x.shape[dim] - 1)
            part = (at - low).view((-1, 1) if dim == 2 else (1, -1))
            x = x.index_select(dim, low).lerp(x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1)), part)
        return (x - 128) / 128
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=resize == "antialias")
    return (x - 128) / 128 if resize == "antialias" else x * (2 / 255) - 1


def load_inception(path: Path) -> Inception:
    with torch.random.fork_rng(devices=[]):  # constructing draws from the global generator
        net = Inception()
    weights = load_dict(path)
    weights = {key: value for key, value in weights.items() if not key.startswith(("fc.", "AuxLogits."))}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of the FID's Inception: its entries do not fit.") from error
    return net.requires_grad_(False)


class FrameMetric(VideoMetric):
    """Frechet distance of frame features (n, width), by their sums.

    A million frames leave n, a sum and a matrix (width, width) of each kind in float64, not their features. For the
    interval, which resamples clips, the features of up to 512 clips of each kind are kept, chosen by a hash of their
    bytes: the same ones in any order and on any number of ranks. Images are clips of one frame.
    """

    higher_is_better = False
    least = 0.0

    def __init__(self, width: int) -> None:
        super().__init__()
        for kind in self.kinds:
            self.add_state(f"{kind}_sum", torch.zeros(width, dtype=torch.float64), "sum")
            self.add_state(f"{kind}_outer", torch.zeros(width, width, dtype=torch.float64), "sum")
            self.add_rows(f"{kind}_kept", width)
            self.add_rows(f"{kind}_key", 2)

    def encode(self, frames: Tensor) -> Tensor:
        """Features (n, width) of uint8 frames (n, 3, h, w)."""
        raise NotImplementedError

    def update(self, videos: Tensor, real: bool) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255. All clips have the same f; each kind one (h, w).

        Raises ValueError for floats, another shape, or a length or size that changes.
        """
        check_videos(videos)
        kind = "real" if real else "fake"
        self.note(videos, kind)
        with exact(self.device):
            features = self.encode(rearrange(videos, "b c f h w -> (b f) c h w").to(self.device)).float()
        rows = features.double()
        setattr(self, f"{kind}_sum", getattr(self, f"{kind}_sum") + rows.sum(0))
        setattr(self, f"{kind}_outer", getattr(self, f"{kind}_outer") + rows.T @ rows)
        getattr(self, f"{kind}_kept").append(features)
        getattr(self, f"{kind}_key").append(keys(videos).to(self.device))
        if sum(len(part) for part in getattr(self, f"{kind}_key")) > 2 * KEPT:
            kept, key = self.kept(kind)
            setattr(self, f"{kind}_kept", [kept.flatten(0, 1)])
            setattr(self, f"{kind}_key", [key])

    def kept(self, kind: str) -> tuple[Tensor, Tensor]:
        """Features (k, f, width) and keys (k, 2) of the up to 512 clips with the lowest keys."""
        key, rows = self.rows(f"{kind}_key"), self.rows(f"{kind}_kept")
        order = (key.double() @ torch.tensor([2.0**16, 1.0], dtype=torch.float64, device=key.device)).argsort()[:KEPT]
        return rows.view(len(key), -1, rows.shape[1])[order], key[order]

    def moments(self) -> list[Moments]:
        self.need()
        return [
            Moments.of_sums(
                int(getattr(self, f"n_{kind}")) * self.frames,
                getattr(self, f"{kind}_sum"),
                getattr(self, f"{kind}_outer"),
            )
            for kind in self.kinds
        ]

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; ValueError where there are fewer than two clips of a kind."""
        return frechet_of_moments(*self.moments())

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        real, fake = self.moments()
        kept = [self.kept(kind)[0] for kind in self.kinds]
        parts = []
        for kind, clips, by_frame in zip(
            self.kinds, kept, moment_influences(real, fake, *(clips.flatten(0, 1) for clips in kept)), strict=True
        ):
            by_clip = by_frame.view(len(clips), -1).sum(1)
            # k clips stand for all n, whose weights vary n / k times as much in sum
            parts.append((by_clip - by_clip.mean()) * (int(getattr(self, f"n_{kind}")) / len(clips)) ** 0.5)
        return frechet_of_moments(real, fake), parts


def keys(videos: Tensor) -> Tensor:
    """Hash of each clip's bytes, the same on every device: two halves (b, 2) of 16 bits, exact in float32."""
    halves = [videos[..., part::2].sum((1, 2, 3, 4), dtype=torch.long) for part in (0, 1)]
    mixed = (halves[0] % 2**16 * 2654435761 + halves[1] % 2**16 * 2246822519) % 2**32
    return torch.stack([mixed // 2**16, mixed % 2**16], 1).float()


class FrechetInceptionDistance(FrameMetric):
    """FID between the frames of generated and real clips; lower is better.

    `weights` is pt_inception-2015-12-05-6726825d.pth by path or address, whose SHA-256 is known and checked; the name
    is then "fid". Another file is taken only with its own `sha256`, as "fid_other". Without weights the network is
    random with a fixed seed and the name is "fid_random". `resize` is one of RESIZE; any but "bilinear" is appended to
    the name. `chunk` frames run at a time.
    """

    network: nn.Module

    def __init__(
        self,
        weights: str | Path | None = None,
        sha256: str | None = None,
        resize: str = "bilinear",
        chunk: int = 64,
    ):
        super().__init__(WIDTH)
        if resize not in RESIZE:
            raise ValueError(f"The resize '{resize}' is not one of {', '.join(RESIZE)}.")
        need_file(weights, sha256)
        self.digest: str | None = None
        if weights is None:
            network = random_inception()
        else:
            path, self.digest = located(weights, sha256 or INCEPTION, "Inception")
            network = load_inception(path)
        name = "fid_random" if weights is None else "fid" if self.digest == INCEPTION else "fid_other"
        self.name = name + ("" if resize == "bilinear" else f"_{resize}")
        object.__setattr__(self, "network", network)  # past nn.Module's registration
        self.resize, self.chunk = resize, chunk

    def encode(self, frames: Tensor) -> Tensor:
        net = self.network.to(self.device)
        return torch.cat([net(prepare(part, self.resize)) for part in frames.split(self.chunk)])

    def details(self) -> dict[str, Any]:
        return {"resize": RESIZE[self.resize], "weights": told(self.digest)}


class ImageEncoder(Protocol):
    """What CLIP-FID asks of a CLIP."""

    name: str

    def image_features(self, images: Tensor, /) -> Tensor:
        """uint8 (n, 3, h, w) to image embeddings (n, d) whose norm is the network's own, not one."""


class CLIPFrechetDistance(FrameMetric):
    """CLIP-FID (arXiv 2203.06026) between the frames of generated and real clips; lower is better.

    Frechet distance of CLIP's image embeddings before they are normalised. It depends on the backbone (the paper has
    ViT-B/32), so `summary` names it and reports must too. `clip` stays out of the module tree.
    """

    name = "clip_fid"

    clip: ImageEncoder

    def __init__(self, clip: ImageEncoder, chunk: int = 64):
        with torch.no_grad():
            width = clip.image_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
        super().__init__(width)
        object.__setattr__(self, "clip", clip)  # past nn.Module's registration
        self.chunk = chunk

    def encode(self, frames: Tensor) -> Tensor:
        return torch.cat([self.clip.image_features(part) for part in frames.split(self.chunk)])

    def details(self) -> dict[str, Any]:
        return {"resize": CLIP_RESIZE, "backbone": self.clip.name}
