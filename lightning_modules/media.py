"""Pictures and clips as files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def strip(pictures: Tensor) -> Tensor:
    """One row of images `3 h w*n`; of clips `b c f h w`, eight frames of the first two of them."""
    if pictures.ndim == 5 and pictures.shape[2] > 1:
        chosen = torch.linspace(0, pictures.shape[2] - 1, 8).round().long()
        return torch.cat([rearrange(clip[:, chosen], "c f h w -> c h (f w)") for clip in pictures[:2]], dim=1)
    if pictures.ndim == 5:
        pictures = pictures.squeeze(2)
    return rearrange(pictures, "b c h w -> c h (b w)")


def to_uint8(picture: Tensor) -> np.ndarray:
    """[-1, 1] `3 ... h w` to uint8 `... h w 3`."""
    values = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return np.ascontiguousarray(values.movedim(0, -1).numpy())


def write_png(path: Path, picture: Tensor) -> None:
    """Write an image `3 h w` in [-1, 1]."""
    Image.fromarray(to_uint8(picture)).save(path)


def write_mp4(path: Path, clip: Tensor, fps: float) -> None:
    """Write a clip `3 f h w` in [-1, 1] as h264; odd sides are cut by a pixel, as yuv420p needs even ones."""
    frames = to_uint8(clip)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        video = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"  # type: ignore
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(video.encode(picture))  # type: ignore[attr-defined]
        container.mux(video.encode())  # type: ignore[attr-defined]
