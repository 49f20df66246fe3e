"""Settings of sampling: presets, what a stage says itself, and noise that frames share."""

import pytest
import torch

from models.sampling import PRESETS, STAGES, CascadeConfig, SamplingConfig, correlated


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_a_stage_does_not(preset):
    config = CascadeConfig(preset=preset, sr_low=SamplingConfig(steps=3), decoder=SamplingConfig("ddim", guidance=2.0))
    for stage in STAGES:
        sampler, steps, bend = PRESETS[preset][stage]
        found = config.sampling(stage)
        assert found.sampler == ("ddim" if stage == "decoder" else sampler)
        assert found.bend == (1.0 if found.sampler != sampler else bend)
        assert found.steps == (3 if stage == "sr_low" else steps)
    assert config.sampling("decoder").guidance == 2.0
    whole = config.resolved()
    whole.preset = "draft"
    assert all(whole.sampling(stage) == config.sampling(stage) for stage in STAGES)


def test_presets_rise_in_cost_and_standard_is_a_tenth():
    for stage in STAGES:
        draft, standard, paper = (PRESETS[name][stage][1] for name in ("draft", "standard", "paper"))
        assert draft < standard <= paper
    assert PRESETS["standard"]["decoder"][1] <= 250 / 10


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"preset": "best"}, "cascade.preset 'best' is not one of draft, standard, paper"),
        ({"decoder": SamplingConfig("euler")}, "cascade.decoder.sampler 'euler' is not one of ddpm, ddim, dpmpp_2m"),
        ({"decoder": SamplingConfig(steps=-1)}, "cascade.decoder.steps is -1: give at least 1, or 0"),
        ({"prior": SamplingConfig(guidance=float("inf"))}, "cascade.prior.guidance is inf"),
        ({"prior": SamplingConfig(rescale=1.5)}, "cascade.prior.rescale is 1.5: give a share, 0 ... 1"),
        ({"sr_low": SamplingConfig(noise_level=-2)}, "cascade.sr_low.noise_level is -2"),
        ({"sr_low": SamplingConfig(alpha=-1)}, "cascade.sr_low.alpha is -1"),
        ({"decoder": SamplingConfig(noise="same")}, "noise 'same' is not one of independent, mixed, progressive"),
    ],
)
def test_what_there_is_not_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        CascadeConfig(**wrong).sampling("decoder")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"frames": 0}, "cascade.frames is 0"),
        ({"frames": -3}, "cascade.frames is -3"),
        ({"frames": 10**9}, "too many"),
        ({"skip": 0}, "cascade.skip is 0"),
        ({"fps": 0.0}, "cascade.fps is 0.0"),
        ({"fps": 0.01}, "cascade.fps is 0.01: give a rate in frames per second, 0.1 ... 1000"),
        ({"fps": float("nan")}, "cascade.fps is nan"),
        ({"chunk": 0}, "cascade.chunk is 0"),
        ({"tile": -1}, "cascade.tile is -1"),
    ],
)
def test_impossible_numbers_of_frames(wrong, words):
    with pytest.raises(ValueError, match=words):
        CascadeConfig(**wrong)


@pytest.mark.parametrize("kind, alpha", [("mixed", 1.0), ("mixed", 3.0), ("progressive", 2.0)])
def test_correlated_noise_has_pyocos_covariances(kind, alpha):
    """PYoCo, section 4.1: unit variance; a^2 / (1 + a^2) between frames, or its root to the power of their distance."""
    torch.manual_seed(0)
    noise = correlated(torch.randn(1, 1, 6, 200, 200), torch.randn(1, 1, 200, 200), kind, alpha)
    found = torch.cov(noise[0, 0].flatten(1))
    near = alpha / (1 + alpha**2) ** 0.5
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    wanted = torch.where(distance == 0, 1.0, near**2) if kind == "mixed" else near ** distance.float()
    assert (found - wanted).abs().max() < 0.03


def test_independent_noise_is_left_as_it_is():
    noise = torch.randn(2, 3, 4, 5, 5)
    assert correlated(noise, noise[:, :, 0], "independent", 1.0) is noise
