"""CLIPSIM (GODIVA, arXiv 2104.14806): does a clip show what its caption says, in the eyes of CLIP."""

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.metrics.fvd import check_videos


class ImageTextEncoder(Protocol):
    """What CLIPSIM asks of a CLIP: rows of both encodings have length one."""

    name: str

    def encode_image(self, images: Tensor, /) -> Tensor:
        """uint8 (n, 3, h, w) to (n, d)."""

    def encode_text(self, captions: list[str], /) -> Tensor:
        """n captions to (n, d)."""


class CLIPSIM(Metric):
    """Cosine of CLIP's text and frame encodings, mean over frames, then over videos; higher is better.

    A plain cosine, not times 100: about 0.24 to 0.32 with real CLIPs. It depends on the backbone (0.3049 with
    B/16 and 0.3001 with B/32 for one model), so `summary` names it and reports must too. `clip` stays out of
    the module tree: a checkpoint never holds it.
    """

    name = "clipsim"
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    n: Tensor
    frames: Tensor
    clip: ImageTextEncoder

    def __init__(self, clip: ImageTextEncoder):
        super().__init__()
        object.__setattr__(self, "clip", clip)  # past nn.Module's registration
        # float64: a sum over the 59,794 captions of MSR-VTT keeps every digit that is reported
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("frames", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="max")

    def update(self, videos: Tensor, captions: list[str]) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255, with a caption each.

        Raises ValueError for floats, another shape, clips of another length, or captions that do not match.
        """
        check_videos(videos)
        b, f = videos.shape[0], videos.shape[2]
        if isinstance(captions, str) or len(captions) != b:
            count = "a single string" if isinstance(captions, str) else f"{len(captions)}"
            raise ValueError(f"Each clip needs one caption in a list: {b} clips came with {count}.")
        if self.frames and self.frames != f:
            raise ValueError(f"All clips have one length; {int(self.frames)} frames came first, now {f}.")
        images = self.clip.encode_image(rearrange(videos, "b c f h w -> (b f) c h w"))
        texts = self.clip.encode_text(list(captions)).to(images.device)
        cosines = torch.einsum("b f d, b d -> b f", images.double().view(b, f, -1), texts.double())
        self.total += cosines.mean(1).sum().to(self.total.device)
        self.n += b
        self.frames.fill_(f)

    def compute(self) -> Tensor:
        """The mean cosine, a float64 scalar; ValueError before the first clip."""
        if not self.n:
            raise ValueError("CLIPSIM needs at least one clip, and there is none.")
        return self.total / self.n

    def summary(self) -> dict[str, int | str | None]:
        """What must be printed beside the number."""
        return {
            "name": self.name,
            "n": int(self.n),
            "frames": int(self.frames) or None,
            "backbone": self.clip.name,
        }
