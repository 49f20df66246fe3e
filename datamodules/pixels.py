"""From pictures of any size to squares of uint8 pixels."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Pixels of a picture or frame: a small file that unpacks to more is a bomb, or a mistake. A camera's JPEG may have
# more, as it is decoded at a part of its size.
LARGEST = 50_000_000


def square(pictures: np.ndarray, resolution: int, crop: int | None = None) -> Tensor:
    """The centre squares of pictures of one size, uint8 (n, h, w, 3), as uint8 (n, 3, resolution, resolution).

    Resized antialiased. The colours of a pixel stay side by side in memory: to part them would cost as much again.
    Where a crop will be cut of them, smaller pictures are not enlarged, as a network for details would learn that there
    are none. Raises ValueError for pictures smaller than the crop.
    """
    height, width = pictures.shape[1:3]
    side = min(height, width)
    if crop is not None:
        if side < crop:
            raise ValueError(f"the picture is smaller than the crop of {crop} pixels")
        resolution = min(resolution, side)
    top, left = (height - side) // 2, (width - side) // 2
    cut = torch.from_numpy(pictures[:, top : top + side, left : left + side]).permute(0, 3, 1, 2)
    if side == resolution:
        return cut
    cut = cut.contiguous(memory_format=torch.channels_last)  # torch is several times faster at these
    return F.interpolate(cut, (resolution, resolution), mode="bicubic", antialias=True)


def random_crop(pixels: Tensor, crop: int | None, rng: np.random.Generator) -> Tensor:
    """A random square of side `crop` from the last two axes, or all of it for None."""
    if crop is None:
        return pixels
    top, left = (int(rng.integers(side - crop + 1)) for side in pixels.shape[-2:])
    return pixels[..., top : top + crop, left : left + crop]


def check_sizes(resolution: int, crop: int | None) -> None:
    """Raises ValueError for a resolution, or a crop of it, that cannot be."""
    if resolution < 1:
        raise ValueError(f"The resolution is {resolution}; give a whole number of pixels of at least 1.")
    if crop is not None and not 1 <= crop <= resolution:
        raise ValueError(f"The crop is {crop} pixels of {resolution}; give a side from 1 to the resolution.")
