"""The cascade with small random networks: what each arrow keeps, and that a sample is its seed alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.cascade import MakeAVideo, SamplingConfig, stream
from models.clip import scaled
from models.samplers import SAMPLERS
from models.stages import windows
from models.unet import UNet
from tests.models.conftest import UPSAMPLER

PROMPTS, SEEDS = ["a red fox", "two blue cars"], [7, 11]


@pytest.fixture
def keyframes():
    return torch.rand(2, 3, 16, 8, 8) * 1.6 - 0.8


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_film(cascade):
    calls = []
    cascade.on_step = lambda *call: calls.append(call)
    film = cascade.text_to_video(PROMPTS, SEEDS)
    assert film.embedding.shape == (2, 16) and film.fps == 30.0
    assert film.decoded.shape == (2, 3, 16, 8, 8) and film.interpolated.shape == (2, 3, 76, 8, 8)
    assert film.low.shape == (2, 3, 76, 12, 12) and film.high.shape == (2, 3, 76, 16, 16)
    for clip in (film.decoded, film.interpolated, film.low, film.high):
        assert (clip.abs() < 1).float().mean() > 0.5  # what follows is not about clipped pictures
        assert (clip[0] - clip[1]).std() > 0.01 and clip.diff(dim=2).std() > 0.01
    assert torch.equal(film.interpolated[:, :, ::5], film.decoded)
    for name, n in (("prior", 3), ("decoder", 2), ("interpolation", 2), ("sr_low", 2), ("sr_high", 20)):
        assert [call for call in calls if call[0] == name] == [(name, i + 1, n) for i in range(n)]


def test_a_sample_does_not_depend_on_its_batch(cascade):
    both, alone = cascade.text_to_video(PROMPTS, SEEDS), cascade.text_to_video(PROMPTS[1:], SEEDS[1:])
    for name in ("embedding", "decoded", "interpolated", "low", "high"):
        close(getattr(both, name)[1:], getattr(alone, name))
    other = cascade.text_to_video(PROMPTS[1:], [12])
    assert not torch.allclose(other.decoded, alone.decoded, atol=0.1)


@pytest.mark.parametrize("window", [16, 0, 7])
def test_given_frames_come_back(cascade, keyframes, window):
    cascade.config.window = window
    dense = cascade.interpolate(keyframes, torch.randn(2, 16), 6.0, SEEDS)
    assert dense.shape == (2, 3, 76, 8, 8) and torch.equal(dense[:, :, ::5], keyframes)
    assert (dense[:, :, 1::5] - keyframes[:, :, :-1]).abs().mean() > 0.05


def test_a_window_sees_its_own_keyframes_alone(cascade, keyframes):
    embedding, batches = torch.randn(2, 16), []
    cascade.interpolation.net.register_forward_pre_hook(
        lambda net, args, kwargs: batches.append((args[0].shape, kwargs["fps"], kwargs["given"])), with_kwargs=True
    )
    windowed = cascade.interpolate(keyframes, embedding, 6.0, SEEDS)
    moved = keyframes.clone()
    moved[:, :, -1] += 0.2
    again = cascade.interpolate(moved, embedding, 6.0, SEEDS)
    assert torch.equal(again[:, :, :61], windowed[:, :, :61])
    difference = (again - windowed).abs().amax(dim=(0, 1, 3, 4))
    assert all(difference[i] > 1e-6 for i in range(61, 75) if i % 5)
    shape, fps, given = batches[0]
    assert shape == (10, 3, 16, 8, 8) and fps.eq(30.0).all()
    assert torch.equal(given[:, 3, :, 0, 0], torch.tensor([1.0, 0, 0, 0, 0] * 3 + [1.0]).expand(10, -1))
    assert not given[:, :3][given[:, 3:].expand(-1, 3, -1, -1, -1) == 0].any()
    cascade.config.window = 0
    whole = cascade.interpolate(keyframes, embedding, 6.0, SEEDS)
    assert batches[-1][0] == (2, 3, 76, 8, 8) and not torch.allclose(whole, windowed, atol=0.01)


def test_a_windowed_sample_does_not_depend_on_its_batch(cascade, keyframes):
    embedding = torch.randn(2, 16)
    both = cascade.interpolate(keyframes, embedding, 6.0, SEEDS)
    close(both[1:], cascade.interpolate(keyframes[1:], embedding[1:], 6.0, SEEDS[1:]))


def test_sr_high_in_chunks(cascade, keyframes):
    whole = cascade.upsample_high(keyframes[:, :, :7], SEEDS)
    for chunk in (1, 3):
        cascade.config.chunk = chunk
        close(cascade.upsample_high(keyframes[:, :, :7], SEEDS), whole)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_equal_frames_stay_equal_in_sr_high(cascade, keyframes, sampler):
    cascade.config.chunk, cascade.config.sr_high = 2, SamplingConfig(sampler, 3, noise_level=200)
    still = keyframes[:, :, :1].expand(-1, -1, 5, -1, -1)
    high = cascade.upsample_high(still, SEEDS)
    close(high, high[:, :, :1].expand_as(high))
    assert high.std() > 0.05 and not torch.allclose(high[0], high[1], atol=0.05)


def test_upsampling_starts_from_the_small_clip(cascade, keyframes):
    class Copy(nn.Module):
        def forward(self, z, t, *, low_res, noise_level, fps):
            assert noise_level.eq(0).all() and fps is None
            return low_res

    cascade.sr_high.net, cascade.config.sr_high = Copy(), SamplingConfig("ddim", 2)
    high = cascade.upsample_high(keyframes, SEEDS)
    for i in (0, 15):
        expected = nn.functional.interpolate(keyframes[:, :, i], (16, 16), mode="bilinear", align_corners=False)
        close(high[:, :, i], expected)


def test_the_better_candidate_is_kept(cascade, monkeypatch):
    text = cascade.clip.encode_text(cascade.clip.tokens(PROMPTS))
    noise = torch.randn(2, 16) * 0.1
    draws = torch.stack([-text[0], 3 * text[0] + noise[0], 5 * text[1] + noise[1], 9 * torch.ones(16)])
    monkeypatch.setattr(cascade, "sample", lambda *args: draws)
    expected = scaled(nn.functional.normalize(draws[[1, 2]], dim=-1))
    close(cascade.embed(PROMPTS, SEEDS), expected)


def test_candidates_are_draws_of_their_own(cascade):
    """Of two candidates, the first is what one candidate would have been; one of both is kept."""
    cascade.config.prior = SamplingConfig("ddim", 3)
    cascade.config.candidates = 1
    first = cascade.embed(PROMPTS, SEEDS)
    cascade.config.candidates = 4
    best = cascade.embed(PROMPTS, SEEDS)
    text = cascade.clip.encode_text(cascade.clip.tokens(PROMPTS))
    assert ((best * text).sum(1) >= (first * text).sum(1) - 1e-5).all()
    assert not torch.allclose(best, first, atol=1e-3)


def test_streams_do_not_meet():
    names = ("prior", "decoder", "interpolation", "sr_low", "sr_high")
    seeds = {stream(seed, name, i) for seed in range(20) for name in names for i in range(4)}
    assert len(seeds) == 20 * 5 * 4


def test_guidance_pushes_away_from_no_condition(cascade):
    embedding = torch.randn(1, 16)
    cascade.config.decoder = SamplingConfig("ddim", 1, 1.0)
    seen = []
    cascade.decoder.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append(kwargs["drop"].tolist()), with_kwargs=True
    )
    one = cascade.decode(embedding, 6.0, [1], frames=2)
    assert seen == [[False]] and one.shape[2] == 2
    cascade.config.decoder = SamplingConfig("ddim", 1, 0.0)
    none = cascade.decode(embedding, 6.0, [1], frames=2)
    cascade.config.decoder = SamplingConfig("ddim", 1, 3.0)
    three = cascade.decode(embedding, 6.0, [1], frames=2)
    close(three.clamp(-1, 1), (none + 3 * (one - none)).clamp(-1, 1))
    assert seen[1:] == [[False], [True]] * 2


def test_guidance_is_of_predictions_that_are_not_clipped(cascade, monkeypatch):
    """x_u + w (x_c - x_u) on x0 is that on eps; with clipped x0 it is not."""
    seen = []
    monkeypatch.setitem(SAMPLERS, "ddim", lambda denoise, z, times, draw: seen.append(denoise(z, times.t[:1])[0]) or z)
    embedding = torch.randn(1, 16)
    net = cascade.decoder.net
    monkeypatch.setattr(net, "forward", lambda z, t, *, drop, **_: torch.full_like(z, 2.0 if drop.any() else 2.3))
    cascade.config.decoder = SamplingConfig("ddim", 1, -4.0)
    cascade.decode(embedding, 6.0, [3])
    close(seen[0], torch.full_like(seen[0], 2.0 - 4 * 0.3))


def test_guided_clips_stay_in_range(cascade):
    cascade.config.decoder = SamplingConfig("ddim", 2, 8.0)
    assert cascade.decode(torch.randn(2, 16), 6.0, SEEDS).abs().max() <= 1


def test_bfloat16(cascade):
    exact = cascade.decode(torch.ones(1, 16), 6.0, [1])
    cascade.dtype = torch.bfloat16
    rough = cascade.decode(torch.ones(1, 16), 6.0, [1])
    assert not torch.equal(rough, exact) and (rough - exact).abs().mean() < 0.05


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(cascade, prompt):
    with pytest.raises(ValueError, match="empty"):
        cascade.text_to_video(["a fox", prompt], SEEDS)


def test_a_film_that_stops(cascade, monkeypatch):
    whole = cascade.text_to_video(PROMPTS, SEEDS)
    names = ("decoded", "interpolated", "low", "high")
    monkeypatch.setattr(cascade, "sr_high", None)  # what is not asked for does not run
    for i, stop in enumerate(("embedding", *names[:3])):
        film = cascade.text_to_video(PROMPTS, SEEDS, stop)
        assert list(film.clips()) == list(names[:i]) and torch.equal(film.embedding, whole.embedding)
        for name, clip in film.clips().items():
            assert torch.equal(clip, getattr(whole, name))
    clip, fps = film.last()
    assert clip is film.low and fps == 30.0
    assert cascade.text_to_video(PROMPTS, SEEDS, "decoded").last()[1] == 6.0
    alone = cascade.text_to_video(PROMPTS, SEEDS, "low", intermediates=False)
    assert list(alone.clips()) == ["low"] and torch.equal(alone.low, whole.low)
    with pytest.raises(ValueError, match="no stage 'end' .* embedding, decoded, interpolated, low, high"):
        cascade.text_to_video(PROMPTS, SEEDS, "end")
    with pytest.raises(ValueError, match="no clip"):
        cascade.text_to_video(PROMPTS, SEEDS, "embedding").last()


@pytest.mark.parametrize("keys, skip", [(1, 5), (2, 5), (5, 5), (16, 2), (9, 3), (4, 20)])
def test_any_number_of_frames_and_any_skip(cascade, keys, skip):
    """Windows that do not divide the film leave a shorter one; all of them keep the given frames."""
    cascade.config.skip = skip
    clip = torch.rand(1, 3, keys, 8, 8) * 1.6 - 0.8
    dense = cascade.interpolate(clip, torch.randn(1, 16), 6.0, [3])
    assert dense.shape[2] == (keys - 1) * skip + 1 and torch.equal(dense[:, :, ::skip], clip)
    assert dense.isfinite().all()


def test_windows_together_or_in_turn_are_the_same(cascade, keyframes):
    embedding = torch.randn(2, 16)
    together = cascade.interpolate(keyframes, embedding, 6.0, SEEDS)
    for n in (1, 2, 3):
        cascade.config.windows = n
        close(cascade.interpolate(keyframes, embedding, 6.0, SEEDS), together)


def test_given_frames_anywhere(cascade):
    clip, known = torch.rand(2, 3, 16, 8, 8) * 1.6 - 0.8, torch.arange(16) % 7 == 0
    made = cascade.complete(clip, known, torch.randn(2, 16), 6.0, SEEDS)
    assert torch.equal(made[:, :, known], clip[:, :, known])
    torch.manual_seed(1)
    other = torch.where(known[:, None, None], clip, torch.rand_like(clip))  # what is not given is not looked at
    torch.manual_seed(0)
    embedding = torch.randn(2, 16)
    a = cascade.complete(clip, known, embedding, 6.0, SEEDS)
    assert torch.equal(a, cascade.complete(other, known, embedding, 6.0, SEEDS))
    assert not torch.allclose(a, cascade.complete(clip, known, embedding, 6.0, SEEDS, turn=2))


@pytest.mark.parametrize("tile", [1, 5, 16])
def test_sr_low_in_tiles(cascade, keyframes, tile):
    cascade.config.tile = 0
    whole = cascade.upsample_low(keyframes, 30.0, SEEDS)
    cascade.config.tile = tile
    close(cascade.upsample_low(keyframes, 30.0, SEEDS), whole)
    assert cascade.most_frames["sr_low"] == 2 * 16
    cascade.most_frames.clear()
    cascade.upsample_low(keyframes[:1], 30.0, SEEDS[:1])
    assert cascade.most_frames["sr_low"] == min(16, tile + 4)


def test_the_frames_at_a_time_are_all_where_a_level_reads_all(cascade, keyframes):
    """Attention over time is not run in tiles, and the number that is printed says so."""
    cascade.config.tile = 1
    cascade.sr_low.net = UNet(replace(UPSAMPLER, attention=[2]), temporal=True)
    cascade.upsample_low(keyframes[:1], 30.0, SEEDS[:1])
    assert cascade.most_frames["sr_low"] == 16


def test_more_noise_than_the_process_has_is_refused(cascade, keyframes):
    for settings, words in ((SamplingConfig("ddim", 1, noise_level=1000), "noise_level 1000"),
                            (SamplingConfig("ddim", 1001), "1001 steps")):  # fmt: skip
        cascade.config.sr_low = settings
        with pytest.raises(ValueError, match=f"cascade.sr_low has .*{words}.* its diffusion has 1000"):
            cascade.upsample_low(keyframes, 30.0, SEEDS)
        with pytest.raises(ValueError, match="cascade.sr_low has"):
            MakeAVideo(cascade.clip, **cascade.stages(), config=cascade.config)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_both_halves_of_guidance_at_once(cascade, monkeypatch, name):
    """In one call of twice the batch, as on a GPU: the same to rounding."""
    cascade.config.prior = SamplingConfig("ddpm", 3, 2.0, rescale=0.5)
    cascade.config.decoder = SamplingConfig("ddpm", 3, 2.0, rescale=0.5)
    calls = []
    stage = getattr(cascade, name)
    stage.net.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))

    def run():
        return cascade.embed(PROMPTS, SEEDS) if name == "prior" else cascade.decode(torch.ones(2, 16), 6.0, SEEDS)

    in_turn, rows = run(), calls[0]
    assert calls == [rows] * 6
    monkeypatch.setattr("models.cascade.at_once_pays", lambda device: True)
    close(run(), in_turn)
    assert calls[6:] == [2 * rows] * 3


@pytest.mark.parametrize(
    "kind, wanted", [("independent", 0.0), ("mixed", 100 / 101), ("progressive", (100 / 101) ** 7.5)]
)
def test_frames_that_share_their_first_noise(cascade, kind, wanted):
    """The covariance of the first frame's noise and the last's, or of far ones', in what the network sees first."""
    cascade.config.decoder = SamplingConfig("ddim", 1, noise=kind, alpha=10.0)
    seen = []
    cascade.decoder.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    both = cascade.decode(torch.ones(2, 16), 6.0, [1, 2])
    first, last = seen[0][:, :, 0].flatten(), seen[0][:, :, 15].flatten()
    assert (first * last).mean() / first.square().mean() == pytest.approx(wanted, abs=0.12)
    assert not torch.allclose(seen[0][0], seen[0][1], atol=0.5)
    close(both[:1], cascade.decode(torch.ones(1, 16), 6.0, [1]))


@pytest.mark.parametrize("kind", ["mixed", "progressive"])
def test_noise_that_frames_share_is_the_same_in_any_windows_and_chunks(cascade, keyframes, kind):
    """It is made for the whole film, so windows have the noise of the frame they share; SR_h's is shared as it is."""
    seen = []
    cascade.config.interpolation = SamplingConfig("ddim", 1, noise=kind, alpha=2.0)
    cascade.interpolation.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    clip, embedding = keyframes[:1], torch.randn(1, 16)
    together = cascade.interpolate(clip, embedding, 6.0, SEEDS[:1])
    noise = seen[0]
    assert len(noise) == 5 and torch.equal(noise[:-1, :, -1], noise[1:, :, 0])
    for n in (1, 2):
        cascade.config.windows = n
        close(cascade.interpolate(clip, embedding, 6.0, SEEDS[:1]), together)
    cascade.config.sr_high = SamplingConfig("ddim", 1, noise_level=200, noise=kind, alpha=2.0)
    seen.clear()
    cascade.sr_high.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    whole = cascade.upsample_high(keyframes[:, :, :5], SEEDS)
    assert seen[0].std() == pytest.approx(1.0, abs=0.1) and torch.equal(seen[0], seen[0][:, :, :1].expand_as(seen[0]))
    cascade.config.chunk = 2
    close(cascade.upsample_high(keyframes[:, :, :5], SEEDS), whole)


@pytest.mark.parametrize("frames", [0, -1, 10**6])
def test_impossible_numbers_of_frames_are_refused(cascade, frames):
    with pytest.raises(ValueError, match=f"a clip of {frames} frames cannot be made"):
        cascade.decode(torch.ones(1, 16), 6.0, [1], frames=frames)


def test_a_seed_for_each_sample(cascade):
    with pytest.raises(ValueError, match="2 samples need as many seeds, not 1"):
        cascade.embed(PROMPTS, [1])
    with pytest.raises(ValueError, match="not 1, -1"):
        cascade.embed(PROMPTS, [1, -1])


def test_an_unknown_sampler_is_named(cascade):
    cascade.config.decoder = SamplingConfig("euler", 2)
    with pytest.raises(ValueError, match="cascade.decoder.sampler 'euler' .* ddpm, ddim, dpmpp_2m"):
        cascade.decode(torch.zeros(1, 16), 6.0, [1])


def test_the_networks_are_frozen(cascade):
    for stage in (cascade.prior, cascade.decoder, cascade.interpolation, cascade.sr_low, cascade.sr_high):
        assert not stage.net.training and not any(p.requires_grad for p in stage.net.parameters())


@pytest.mark.parametrize(
    "frames, length, skip, together, wanted",
    [
        (76, 16, 5, 5, [[(0, 16), (15, 31), (30, 46), (45, 61), (60, 76)]]),
        (76, 16, 5, 3, [[(0, 16), (15, 31), (30, 46)], [(45, 61), (60, 76)]]),
        (121, 0, 5, 5, [[(0, 121)]]),
        (41, 16, 5, 5, [[(0, 16), (15, 31)], [(30, 41)]]),
        (31, 16, 2, 9, [[(0, 15), (14, 29)], [(28, 31)]]),
        (41, 16, 20, 5, [[(0, 21), (20, 41)]]),
        (6, 16, 5, 5, [[(0, 6)]]),
        (1, 16, 5, 5, [[(0, 1)]]),
        (1, 0, 5, 5, [[(0, 1)]]),
    ],
)
def test_windows_of_a_film(frames, length, skip, together, wanted):
    assert windows(frames, length, skip, together) == wanted
