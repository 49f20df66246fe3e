"""From a picture of any size to a square of uint8 pixels."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def square(image: Image.Image, resolution: int, crop: int | None = None) -> Image.Image:
    """The short side resized to `resolution`, then the centre square. PIL always resizes antialiased.

    Where a crop will be cut of it, a smaller picture is not enlarged, as a network for details would learn that there
    are none. Raises ValueError for a picture smaller than the crop.
    """
    width, height = image.size
    if crop is not None:
        if min(width, height) < crop:
            raise ValueError(f"the picture is smaller than the crop of {crop} pixels")
        resolution = min(resolution, width, height)
    scale = resolution / min(width, height)
    size = max(round(width * scale), resolution), max(round(height * scale), resolution)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def random_crop(pixels: Tensor, crop: int | None, rng: np.random.Generator) -> Tensor:
    """A random square of side `crop` from the last two axes, or all of it for None."""
    if crop is None:
        return pixels
    top, left = (int(rng.integers(side - crop + 1)) for side in pixels.shape[-2:])
    return pixels[..., top : top + crop, left : left + crop].contiguous()


def check_sizes(resolution: int, crop: int | None) -> None:
    """Raises ValueError for a resolution, or a crop of it, that cannot be."""
    if resolution < 1:
        raise ValueError(f"The resolution is {resolution}; give a whole number of pixels of at least 1.")
    if crop is not None and not 1 <= crop <= resolution:
        raise ValueError(f"The crop is {crop} pixels of {resolution}; give a side from 1 to the resolution.")
