"""Degradation of the small pictures that SR_h trains on: a random mix of blur, resizing, noise and JPEG.

unCLIP (arXiv 2204.06125) names BSR (arXiv 2103.14006) and gives no strengths. Those here are about the milder ones
that latent diffusion (arXiv 2112.10752) took for it: BSRGAN's own are for photographs of unknown origin, and what SR_h
enlarges comes from SR_l.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

DRAWS = 15  # uniform numbers that decide what happens to a sample

ROUND = 0.65  # pixels, largest deviation of a blur that is the same in all directions
OVAL = 1.32  # of one that is not, along either of its axes
GRAIN = 8 / 255  # largest deviation of the noise, as a share of the range
QUALITY = (80, 95)  # of JPEG
JPEG_SHARE = 0.9  # of samples
FILTERS = (("bilinear", True), ("bilinear", False), ("bicubic", False))  # of resizing: mode and antialiasing

# Annex K of ITU-T T.81, as every encoder has them: quantisation of brightness and of colours at quality 50.
LUMA = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
        14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
        49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)  # fmt: skip
CHROMA = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
          47, 66, 99, 99, 99, 99, 99, 99, *[99] * 32)  # fmt: skip
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # from RGB


def bsr(clips: Tensor, factor: int, draws: Tensor, noise: Tensor) -> Tensor:
    """Clips `b 3 f h w` in [-1, 1] made small by `factor` and degraded, each in an order and by strengths of its own.

    All frames of a clip suffer the same but for the noise, whose strength alone they share.

    Args:
        draws: uniform in [0, 1), `b DRAWS`, on the CPU: they decide sizes, which a GPU would be waited for.
        noise: standard normal, as clips.
    """
    small = clips.shape[-1] // factor
    made = [
        degrade(clip.transpose(0, 1), small, each, grain.transpose(0, 1))
        for clip, each, grain in zip(clips, draws.tolist(), noise, strict=True)
    ]
    return torch.stack(made).transpose(1, 2).clamp(-1, 1)


def degrade(frames: Tensor, small: int, draws: list[float], noise: Tensor) -> Tensor:
    """One clip's frames `f 3 h w` to `f 3 small small`: blur, resizing, noise and JPEG in the order that is drawn."""
    order, blur, size, grain, (quality, skip) = draws[:4], draws[4:8], draws[8:11], draws[11:13], draws[13:]
    for step in sorted(range(4), key=order.__getitem__):
        if step == 0:
            frames = blurred(frames, *deviations(*blur[:3]), angle=math.pi * blur[3])
        elif step == 1:
            frames = shrunk(frames, small, *size)
        elif step == 2:
            frames = grainy(frames, noise, 2 * GRAIN * grain[0], grey=grain[1] < 0.5)
        elif skip < JPEG_SHARE:
            frames = jpeg(frames, round(QUALITY[0] + (QUALITY[1] - QUALITY[0]) * quality))
    return frames


def deviations(kind: float, a: float, b: float) -> tuple[float, float]:
    """Of a blur along its two axes, in pixels: half of the time the same, else each of its own."""
    return (ROUND * a, ROUND * a) if kind < 0.5 else (OVAL * math.sqrt(a), OVAL * math.sqrt(b))


def blurred(x: Tensor, along: float, across: float, angle: float, radius: int = 4) -> Tensor:
    """Pictures `n c h w` under a Gaussian with these deviations along and across a direction (radians)."""
    line = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    u = line[None, :] * math.cos(angle) + line[:, None] * math.sin(angle)
    v = line[:, None] * math.cos(angle) - line[None, :] * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / max(along, 0.1)).square() + (v / max(across, 0.1)).square()))
    weight = (kernel / kernel.sum()).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [radius] * 4, mode="replicate"), weight, groups=x.shape[1])


def shrunk(x: Tensor, small: int, scale: float, first: float, second: float) -> Tensor:
    """Pictures at `small` x `small`, by way of a size between their own and half of that, with two drawn filters."""
    side = x.shape[-1]
    between = max(1, round(side / (1 + (2 * side / small - 1) * scale)))
    for size, which in ((between, first), (small, second)):
        mode, antialias = FILTERS[int(len(FILTERS) * which)]
        x = F.interpolate(x, (size, size), mode=mode, antialias=antialias, align_corners=False)
    return x


def grainy(x: Tensor, noise: Tensor, deviation: float, grey: bool) -> Tensor:
    """Pictures with noise of this deviation, the same in all three colours where `grey`."""
    noise = noise[..., : x.shape[-2], : x.shape[-1]]
    return x + deviation * (noise[:, :1] if grey else noise)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """What JPEG of quality 1 ... 100 leaves of pictures `n 3 h w` in [-1, 1]; colours are kept at half the side."""
    h, w = x.shape[-2:]
    ycc = x.new_tensor(YCC)
    pixels = 127.5 * (F.pad(x, (0, -w % 16, 0, -h % 16), mode="replicate").clamp(-1, 1) + 1)
    pixels = torch.einsum("d c, n c h w -> n d h w", ycc, pixels - 128)
    coarseness = (5000 // quality if quality < 50 else 200 - 2 * quality) / 100
    light = quantised(pixels[:, :1], LUMA, coarseness)
    colour = quantised(F.avg_pool2d(pixels[:, 1:], 2), CHROMA, coarseness)
    colour = F.interpolate(colour, scale_factor=2.0, mode="bilinear", align_corners=False)
    pixels = torch.einsum("c d, n d h w -> n c h w", torch.linalg.inv(ycc), torch.cat((light, colour), dim=1)) + 128
    return (pixels[..., :h, :w] / 127.5 - 1).clamp(-1, 1)


def quantised(x: Tensor, table: tuple[int, ...], coarseness: float) -> Tensor:
    """Channels `n c h w` of 8-bit range around zero after the cosine transform of 8 x 8 blocks was rounded."""
    k = torch.arange(8, device=x.device, dtype=x.dtype)
    cosine = torch.cos(math.pi / 8 * (k[None, :] + 0.5) * k[:, None]) / 2
    cosine[0] /= math.sqrt(2)
    steps = (x.new_tensor(table).view(8, 8) * coarseness + 0.5).floor().clamp(1, 255)
    blocks = rearrange(x, "n c (h a) (w b) -> n c h w a b", a=8, b=8)
    kept = (cosine @ blocks @ cosine.T / steps).round() * steps
    return rearrange(cosine.T @ kept @ cosine, "n c h w a b -> n c (h a) (w b)")
