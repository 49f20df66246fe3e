"""CLIPSIM (GODIVA, arXiv 2104.14806): does a clip show what its caption says, in the eyes of CLIP."""

from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from lightning_modules.metrics.video_metric import VideoMetric, check_videos


class ImageTextEncoder(Protocol):
    """What CLIPSIM asks of a CLIP: rows of both encodings have length one."""

    name: str

    def encode_image(self, images: Tensor, /) -> Tensor:
        """uint8 (n, 3, h, w) to (n, d)."""

    def encode_text(self, captions: list[str], /) -> Tensor:
        """n captions to (n, d)."""


class CLIPSIM(VideoMetric):
    """Cosine of CLIP's text and frame encodings, mean over frames, then over videos; higher is better.

    A plain cosine, not times 100: about 0.24 to 0.32 with real CLIPs. It depends on the backbone (0.3049 with
    B/16 and 0.3001 with B/32 for one model), so `summary` names it and reports must too. `clip` stays out of
    the module tree: a checkpoint never holds it.
    """

    kinds = ("fake",)
    name = "clipsim"
    higher_is_better = True

    fake: list[Tensor]
    clip: ImageTextEncoder

    def __init__(self, clip: ImageTextEncoder):
        super().__init__()
        object.__setattr__(self, "clip", clip)  # past nn.Module's registration
        self.add_rows("fake", 1)  # the mean cosine of each video

    def update(self, videos: Tensor, captions: list[str]) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255, with a caption each.

        Raises ValueError for floats, another shape, clips of another length or size, or captions that do not match.
        """
        check_videos(videos)
        b, f = videos.shape[0], videos.shape[2]
        if isinstance(captions, str) or len(captions) != b:
            count = "a single string" if isinstance(captions, str) else f"{len(captions)}"
            raise ValueError(f"Each clip needs one caption in a list: {b} clips came with {count}.")
        self.note(videos, "fake")
        images = self.clip.encode_image(rearrange(videos, "b c f h w -> (b f) c h w"))
        texts = self.clip.encode_text(list(captions)).to(images.device)
        cosines = torch.einsum("b f d, b d -> b f", images.double().view(b, f, -1), texts.double())
        self.fake.append(cosines.mean(1, keepdim=True).float().to(self.device))

    def compute(self) -> Tensor:
        """The mean cosine, a float64 scalar; ValueError before the first clip."""
        self.need(1)
        return self.rows("fake").double().mean()  # float64: of 59,794 captions every digit that is reported counts

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        scores = self.rows("fake").double().squeeze(1)
        return self.compute(), [scores / len(scores)]

    def details(self) -> dict[str, Any]:
        return {"backbone": self.clip.name}
