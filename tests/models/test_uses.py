"""What else the cascade makes: given frames come back exactly, and the condition is what it should be."""

import math

import pytest
import torch
from torch.nn import functional as F

from models import uses
from models.clip import scaled
from models.sampling import SamplingConfig


@pytest.fixture
def maker(cascade):
    cascade.config.interpolation = cascade.config.decoder = SamplingConfig("ddim", 1)
    return cascade


@pytest.fixture
def conditions(maker):
    """The embeddings that upF and D^t are called with."""
    seen = []
    for stage in (maker.decoder, maker.interpolation):
        stage.net.register_forward_pre_hook(lambda net, args, kw: seen.append(kw["embedding"]), with_kwargs=True)
    return seen


def pictures(n=1, side=8):
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8)


def clips(n=1, frames=16, side=8):
    return torch.randint(256, (n, 3, frames, side, side), dtype=torch.uint8)


def pixels(values):
    return values.float() / 127.5 - 1


def test_a_picture_is_the_first_frame_and_the_condition(maker, conditions):
    picture = pictures(2)
    film = uses.animate(maker, picture, [1, 2])
    assert film.decoded.shape == (2, 3, 16, 8, 8) and film.high.shape == (2, 3, 76, 16, 16) and film.fps == 30.0
    assert torch.equal(film.decoded[:, :, 0], pixels(picture))
    assert torch.equal(film.interpolated[:, :, 0], pixels(picture))
    assert torch.equal(film.interpolated[:, :, ::5], film.decoded)
    torch.testing.assert_close(conditions[0], scaled(maker.clip.encode_image(picture)))
    alone = uses.animate(maker, picture[1:], [2])
    torch.testing.assert_close(alone.high, film.high[1:], atol=1e-5, rtol=1e-5)


def test_a_larger_picture_is_given_at_the_decoders_size(maker):
    picture = pictures(1, 32)
    film = uses.animate(maker, picture, [1], stop="decoded")
    small = F.interpolate(picture.float(), (8, 8), mode="bicubic", antialias=True).round().clamp(0, 255)
    assert torch.equal(film.decoded[:, :, 0], small / 127.5 - 1) and film.low is None


def test_between_two_pictures(maker, conditions):
    first, last = pictures(), pictures()
    film = uses.between(maker, first, last, [3], weight=0.25, stop="interpolated")
    assert torch.equal(film.interpolated[:, :, 0], pixels(first))
    assert torch.equal(film.interpolated[:, :, -1], pixels(last))
    a, b = (uses.picture_embedding(maker, x) for x in (first, last))
    torch.testing.assert_close(conditions[0], uses.slerp(a, b, 0.25))
    with pytest.raises(ValueError, match="two pictures of one size"):
        uses.between(maker, first, pictures(1, 16), [3])


@pytest.mark.parametrize("forward, backward", [(1, 0), (0, 1), (2, 1), (0, 3)])
def test_extrapolation(maker, conditions, forward, backward):
    """Seven frames are given each time, nine are new; the source stays in its place, exactly."""
    clip = clips(2)
    film = uses.extend(maker, clip, 5.0, [1, 2], forward, backward, stop="interpolated")
    frames = 16 + 9 * (forward + backward)
    assert film.decoded.shape == (2, 3, frames, 8, 8) and film.fps == 25.0
    start = 9 * backward
    assert torch.equal(film.decoded[:, :, start : start + 16], pixels(clip))
    assert film.interpolated.shape[2] == (frames - 1) * 5 + 1
    assert torch.equal(film.interpolated[:, :, 5 * start : 5 * (start + 16) : 5], pixels(clip))
    torch.testing.assert_close(conditions[0], uses.clip_embedding(maker, clip))
    new = film.decoded[:, :, start + 16 :] if forward else film.decoded[:, :, :start]
    assert new.diff(dim=2).abs().mean() > 0.01


def test_every_turn_of_an_extrapolation_has_its_own_noise(maker):
    """Forward twice is forward once, and once more from there."""
    clip = clips()
    once, twice = (uses.extend(maker, clip, 5.0, [1], n, stop="decoded").decoded for n in (1, 2))
    assert torch.equal(once, twice[:, :, :25])
    assert not torch.allclose(twice[:, :, 16:25], twice[:, :, 25:], atol=0.05)


def test_one_frame_is_extended_like_a_picture(maker):
    film = uses.extend(maker, clips(frames=1), 5.0, [1], stop="decoded")
    assert film.decoded.shape[2] == 16


@pytest.mark.parametrize("forward, backward", [(0, 0), (-1, 2), (200, 0)])
def test_impossible_extrapolations(maker, forward, backward):
    with pytest.raises(ValueError, match="extended 1 to 100 times"):
        uses.extend(maker, clips(), 5.0, [1], forward, backward)


def test_no_room_for_new_frames(maker):
    maker.config.frames = 1
    for use in (lambda: uses.animate(maker, pictures(), [1]), lambda: uses.extend(maker, clips(), 5.0, [1])):
        with pytest.raises(ValueError, match="no room"):
            use()


def test_a_variation_is_of_the_mean_embedding(maker, conditions):
    clip = clips(1, 5, 16)
    film = uses.vary(maker, clip, [4], stop="decoded")
    each = maker.clip.encode_image(clip[0].transpose(0, 1))
    torch.testing.assert_close(conditions[0], scaled(F.normalize(each.mean(0, keepdim=True), dim=-1)))
    assert torch.equal(film.decoded, maker.decode(film.embedding, maker.config.fps, [4]))
    other = uses.vary(maker, clip, [5], stop="decoded")
    assert not torch.allclose(other.decoded, film.decoded, atol=0.05)


def test_an_edit_goes_from_one_text_towards_another(maker):
    embedding = scaled(F.normalize(torch.randn(3, 16), dim=-1))
    before, after = maker.clip.encode_text(["a fox", "a blue fox"])
    direction = scaled(F.normalize(after - before, dim=0)[None])
    closeness = []
    for weight in (0.0, 0.25, 0.5, 1.0):
        moved = uses.edit(maker, embedding, "a fox", "a blue fox", weight)
        torch.testing.assert_close(moved.norm(dim=-1), embedding.norm(dim=-1))
        closeness.append(F.cosine_similarity(moved, direction.expand(3, -1)))
    assert (torch.stack(closeness).diff(dim=0) > 0).all()
    torch.testing.assert_close(uses.edit(maker, embedding, "a fox", "a blue fox", 0.0), embedding)
    for wrong in (("", "a fox"), ("a fox", " "), ("a fox", "a fox")):
        with pytest.raises(ValueError, match="texts"):
            uses.edit(maker, embedding, *wrong)


def test_slerp():
    """Half of a right angle is 45 degrees; the ends are the ends; between the same, or opposite, it is finite."""
    a, b = torch.eye(4)[:1] * 2, torch.eye(4)[1:2] * 2  # scaled: norm sqrt(4)
    torch.testing.assert_close(uses.slerp(a, b, 0.5), torch.tensor([[2**0.5, 2**0.5, 0, 0]]))
    torch.testing.assert_close(uses.slerp(a, b, 1 / 3), 2 * torch.tensor([[3**0.5 / 2, 0.5, 0, 0]]))
    for weight, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(uses.slerp(a, b, weight), end)
    torch.testing.assert_close(uses.slerp(a, a, 0.3), a)
    for weight in (0.0, 0.25, 0.5, 1.0):  # between opposites a half circle, by any way
        way = uses.slerp(a, -a, weight)
        torch.testing.assert_close(way.norm(dim=-1), torch.tensor([2.0]))
        assert float((way * a).sum()) == pytest.approx(4 * math.cos(math.pi * weight), abs=1e-5)
    with pytest.raises(ValueError, match="0 ... 1, not 1.5"):
        uses.slerp(a, b, 1.5)


def test_pictures_must_be_square(maker):
    with pytest.raises(ValueError, match="square, not 12 x 8"):
        uses.animate(maker, torch.zeros(1, 3, 8, 12, dtype=torch.uint8), [1])


USES = {
    "animate": lambda maker, of, seeds, stop: uses.animate(maker, of(pictures(2)), seeds, stop),
    "between": lambda maker, of, seeds, stop: uses.between(maker, of(pictures(2)), of(pictures(2)), seeds, 0.5, stop),
    "extend": lambda maker, of, seeds, stop: uses.extend(maker, of(clips(2, 9)), 5.0, seeds, 1, 1, stop),
    "vary": lambda maker, of, seeds, stop: uses.vary(maker, of(clips(2, 3)), seeds, stop),
    "edit": lambda maker, of, seeds, stop: uses.from_embedding(
        maker, uses.edit(maker, uses.picture_embedding(maker, of(pictures(2))), "a fox", "a cat"), seeds, stop
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_sample_does_not_depend_on_its_batch(maker, use):
    def made(rows, seeds, stop="low"):
        torch.manual_seed(2)
        return USES[use](maker, lambda inputs: inputs[rows], seeds, stop)

    both, alone = made(slice(None), [4, 5]), made(slice(1, None), [5])
    for name in ("embedding", "decoded", "interpolated", "low"):
        torch.testing.assert_close(getattr(both, name)[1:], getattr(alone, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_a_wrong_stop_is_refused_before_anything_is_sampled(maker, use, monkeypatch):
    monkeypatch.setattr(maker, "sample", lambda *_: pytest.fail("sampled"))
    for stop in ("end", "embedding"):
        with pytest.raises(ValueError, match=f"no stage '{stop}' to stop after"):
            USES[use](maker, lambda inputs: inputs, [4, 5], stop)
