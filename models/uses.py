"""What else the cascade makes (paper, section 4; unCLIP, arXiv 2204.06125, section 3): the same networks on pictures
and clips of one's own.

Pictures are `b 3 h w`, clips `b 3 f h w`, uint8 and square, of any size: CLIP sees them as they are, upF at the
decoder's size. Frames that are given are, at that size, exactly those of the film's `decoded` and `interpolated`; what
super-resolution makes of them is larger, and its own.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from models.cascade import Film, MakeAVideo
from models.clip import scaled
from models.stages import check_stop


def animate(maker: MakeAVideo, pictures: Tensor, seeds: Sequence[int], stop: str = "high") -> Film:
    """Pictures set in motion: each is the first frame, its CLIP embedding the condition, upF makes what follows."""
    check_stop(stop)
    keys, known = frames_of(maker, pictures.unsqueeze(2), [0])
    return continued(maker, keys, known, picture_embedding(maker, pictures), seeds, stop)


def between(
    maker: MakeAVideo, first: Tensor, last: Tensor, seeds: Sequence[int], weight: float = 0.5, stop: str = "high"
) -> Film:
    """The passage from one picture to another, under a slerp of their embeddings (at `weight` of the way)."""
    check_stop(stop)
    small = torch.stack((first, last), dim=2) if first.shape == last.shape else None
    if small is None:
        raise ValueError(f"two pictures of one size are needed, not of {first.shape[-1]} and {last.shape[-1]} pixels.")
    keys, known = frames_of(maker, small, [0, maker.config.frames - 1])
    embedding = slerp(picture_embedding(maker, first), picture_embedding(maker, last), weight)
    return continued(maker, keys, known, embedding, seeds, stop)


def extend(
    maker: MakeAVideo,
    clips: Tensor,
    fps: float,
    seeds: Sequence[int],
    forward: int = 1,
    backward: int = 0,
    stop: str = "high",
) -> Film:
    """What comes after clips of `fps`, and what came before, each as often as asked.

    Every time upF is given almost half of a clip of the training length, as many frames as in training at most, and
    makes the rest: 9 frames after 7. The condition is the mean CLIP embedding of the frames that were given at first.
    """
    check_stop(stop)
    length = maker.config.frames
    kept = min(clips.shape[2], max(1, length // 2 - 1))
    if min(forward, backward) < 0 or not 1 <= forward + backward <= 100:
        raise ValueError(f"a clip is extended 1 to 100 times in all, not {forward} forward and {backward} backward.")
    if length <= kept:
        raise ValueError(f"clips of {length} frames leave no room for new ones (cascade.frames).")
    embedding, film = clip_embedding(maker, clips), at_decoder_size(maker, clips)
    for turn in range(forward + backward):
        ahead = turn < forward
        given = film[:, :, -kept:] if ahead else film[:, :, :kept]
        rest = film.new_zeros(*film.shape[:2], length - kept, *film.shape[3:])
        known = torch.zeros(length, dtype=torch.bool)
        known[slice(kept) if ahead else slice(-kept, None)] = True
        clip = torch.cat((given, rest) if ahead else (rest, given), dim=2)
        made = maker.complete(clip, known, embedding, fps, seeds, turn + 1)
        film = torch.cat((film, made[:, :, kept:]) if ahead else (made[:, :, :-kept], film), dim=2)
    return finished(maker, film, embedding, fps, seeds, stop)


def vary(maker: MakeAVideo, clips: Tensor, seeds: Sequence[int], stop: str = "high") -> Film:
    """New films of the same content: D^t on the mean CLIP embedding of the clip's frames. A picture is one frame."""
    return from_embedding(maker, clip_embedding(maker, clips), seeds, stop)


def edit(maker: MakeAVideo, embedding: Tensor, before: str, after: str, weight: float = 0.35) -> Tensor:
    """An embedding moved as a text says, scaled `b d`: a slerp by `weight` towards CLIP(after) - CLIP(before).

    unCLIP's text difference (its section 3.3), which takes weights of 0.25 to 0.5. `before` describes what there is,
    "a photo" where that is not known. Raises ValueError for texts that are empty or the same.
    """
    if not before.strip() or not after.strip():
        raise ValueError("an edit needs two texts: what there is, and what it should become.")
    texts = maker.clip.encode_text([before, after], maker.device)
    difference = texts[1:] - texts[:1]
    if difference.norm() < 1e-6:
        raise ValueError("the two texts are the same to CLIP, so there is nothing to change.")
    return slerp(embedding, scaled(F.normalize(difference, dim=-1)).expand_as(embedding), weight)


def from_embedding(maker: MakeAVideo, embedding: Tensor, seeds: Sequence[int], stop: str = "high") -> Film:
    """A film of a scaled CLIP image embedding `b d`, that of an edit for one."""
    check_stop(stop)
    fps = maker.config.fps
    return finished(maker, maker.decode(embedding, fps, seeds), embedding, fps, seeds, stop)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point at `weight` of the way from a to b on the sphere, for each row of scaled embeddings `b d`.

    Raises ValueError for a weight outside 0 ... 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"a weight between two embeddings is 0 ... 1, not {weight}.")
    x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (x * y).sum(-1, keepdim=True).clamp(-1, 1).acos()
    near = angle.sin() < 1e-4  # the same, or opposite
    sine = torch.where(near, 1.0, angle.sin())
    u = torch.where(near, 1 - weight, ((1 - weight) * angle).sin() / sine)
    v = torch.where(near, weight, (weight * angle).sin() / sine)
    # between opposites no way is the shortest: one goes by the axis that is the furthest from them
    axis = F.one_hot(x.abs().argmin(-1), x.shape[-1]).to(x)
    by = F.normalize(axis - (axis * x).sum(-1, keepdim=True) * x, dim=-1)
    turned = math.cos(weight * math.pi) * x + math.sin(weight * math.pi) * by
    return scaled(F.normalize(torch.where(near & (angle > 1), turned, u * x + v * y), dim=-1))


def picture_embedding(maker: MakeAVideo, pictures: Tensor) -> Tensor:
    """Scaled CLIP embeddings `b d` of pictures."""
    return scaled(maker.clip.encode_image(pictures.to(maker.device)))


def clip_embedding(maker: MakeAVideo, clips: Tensor) -> Tensor:
    """Scaled means `b d` over the CLIP embeddings of each clip's frames."""
    frames = clips.transpose(1, 2).flatten(0, 1).to(maker.device)
    each = maker.clip.encode_image(frames).unflatten(0, (len(clips), -1))
    return scaled(F.normalize(each.mean(1), dim=-1))


def at_decoder_size(maker: MakeAVideo, clips: Tensor) -> Tensor:
    """uint8 `b 3 f h w` to [-1, 1] at the decoder's size, as training saw them (bicubic, antialiased)."""
    side, (b, _, f, h, w) = maker.decoder.size, clips.shape
    if h != w:
        raise ValueError(f"pictures must be square, not {w} x {h}: cut them first.")
    frames = clips.to(maker.device).transpose(1, 2).flatten(0, 1)
    if h != side:
        frames = F.interpolate(frames.float(), (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    return (frames.float() / 127.5 - 1).unflatten(0, (b, f)).transpose(1, 2)


def frames_of(maker: MakeAVideo, clips: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A clip of the decoder's length with the given frames in their places, and which they are."""
    length = maker.config.frames
    if length < 2 or max(places) >= length:
        raise ValueError(f"clips of {length} frames leave no room for new ones (cascade.frames).")
    small, known = at_decoder_size(maker, clips), torch.zeros(length, dtype=torch.bool)
    keys = small.new_zeros(*small.shape[:2], length, *small.shape[3:])
    keys[:, :, list(places)], known[list(places)] = small, True
    return keys, known


def continued(
    maker: MakeAVideo, keys: Tensor, known: Tensor, embedding: Tensor, seeds: Sequence[int], stop: str
) -> Film:
    """upF makes what is missing of the decoder's frames, and the cascade goes on from there."""
    fps = maker.config.fps
    return finished(maker, maker.complete(keys, known, embedding, fps, seeds), embedding, fps, seeds, stop)


def finished(
    maker: MakeAVideo, decoded: Tensor, embedding: Tensor, fps: float, seeds: Sequence[int], stop: str
) -> Film:
    """The film of which these are the frames of the decoder's rate."""
    film = Film(embedding, decoded, fps=fps * maker.config.skip, decoded_fps=fps)
    return maker.finish(replace(film), seeds, stop)
