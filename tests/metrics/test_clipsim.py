"""CLIPSIM: the cosine by hand, its states, its errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.metrics import CLIPSIM

COLOURS = {"red": 0, "green": 1, "blue": 2}


class ColourClip(nn.Module):
    """Encodes a frame as its mean colour, a caption as the colour it names; a module, as a true CLIP is."""

    name = "colour"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def encode_image(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4
        return F.normalize(images.float().mean((2, 3)), dim=1)

    def encode_text(self, captions):
        return torch.eye(3)[[COLOURS[c] for c in captions]]


def clips(n, seed=0, f=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, 3, f, 8, 8), dtype=torch.uint8, generator=generator)


def test_mean_over_frames_then_videos():
    videos = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
    videos[0, 0, :3] = 200  # three red frames
    videos[0, 1, 3] = 90  # and a green one: 3/4
    videos[1, :2] = 50  # yellow throughout: 1/sqrt(2)
    metric = CLIPSIM(ColourClip())
    metric.update(videos, ["red", "green"])
    assert metric.compute().item() == pytest.approx((0.75 + 0.5**0.5) / 2, rel=1e-6)


def test_streamed_permuted_and_merged_equal_one_batch():
    videos, captions = clips(6), ["red", "green", "blue", "red", "red", "blue"]
    whole, first, second = (CLIPSIM(ColourClip()) for _ in range(3))
    whole.update(videos, captions)
    for metric, order in ((first, [5, 0]), (second, [3, 1]), (first, [2, 4])):
        metric.update(videos[order], [captions[i] for i in order])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute())
    assert whole.summary() == {"name": "clipsim", "n": 6, "frames": 4, "resolution": "8x8", "backbone": "colour"}
    assert first.summary() == whole.summary()


def test_the_interval_is_that_of_the_mean_over_videos():
    videos, captions = clips(60, f=1), ["red", "green", "blue"] * 20
    metric = CLIPSIM(ColourClip())
    metric.update(videos, captions)
    scores = metric.rows("fake").double()
    half = 1.96 * scores.std(correction=0).item() / 60**0.5
    low, high = metric.interval(resamples=4000)
    assert low == pytest.approx(metric.compute().item() - half, abs=0.1 * half)
    assert high == pytest.approx(metric.compute().item() + half, abs=0.1 * half)
    narrow = metric.interval(level=0.5, resamples=4000)
    assert low < narrow[0] < narrow[1] < high
    again = CLIPSIM(ColourClip())
    again.update(videos.flip(0), captions[::-1])
    assert again.interval() == pytest.approx(metric.interval(), abs=1e-6) != again.interval(seed=1)


def test_an_image_is_a_clip_of_one_frame_and_reset_forgets():
    metric = CLIPSIM(ColourClip())
    metric.update(clips(2), ["red", "blue"])
    metric.reset()
    metric.update(clips(1, f=1), ["red"])
    assert metric.summary()["n"] == 1 and metric.summary()["frames"] == 1


def test_clip_is_outside_the_module_tree():
    metric = CLIPSIM(ColourClip())
    assert not list(metric.modules())[1:] and not list(metric.parameters()) and not metric.state_dict()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_errors():
    metric = CLIPSIM(ColourClip())
    with pytest.raises(ValueError, match="clipsim needs at least one clip, and there are 0"):
        metric.compute()
    with pytest.raises(ValueError, match="2 clips came with 1"):
        metric.update(clips(2), ["red"])
    with pytest.raises(ValueError, match="single string"):
        metric.update(clips(3), "red")
    with pytest.raises(ValueError, match="uint8 in 0..255"):
        metric.update(clips(1).float(), ["red"])
    with pytest.raises(ValueError, match=r"shape \(b, 3, f, h, w\)"):
        metric.update(clips(1)[:, :2], ["red"])
    metric.update(clips(1), ["red"])
    with pytest.raises(ValueError, match="4 frames came first, now 5"):
        metric.update(clips(1, f=5), ["red"])
