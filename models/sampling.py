"""How the stages of the cascade are sampled: sampler, steps, guidance and noise of each, and the presets."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.samplers import SAMPLERS

STAGES = ("prior", "decoder", "interpolation", "sr_low", "sr_high")
NOISES = ("independent", "mixed", "progressive")

# Sampler, steps and bend of each stage. `paper` is unCLIP's table (arXiv 2204.06125, appendix C); `standard` is chosen
# by `make curve`: a tenth of the network calls of 250-step DDIM, or fewer, at the same distance from real clips.
PRESETS: dict[str, dict[str, tuple[str, int, float]]] = {
    "draft": {
        "prior": ("ddim", 10, 1.0),
        "decoder": ("dpmpp_2m", 10, 1.5),
        "interpolation": ("dpmpp_2m", 6, 1.5),
        "sr_low": ("ddim", 4, 1.0),
        "sr_high": ("ddim", 3, 1.0),
    },
    "standard": {
        "prior": ("ddim", 30, 1.0),
        "decoder": ("dpmpp_2m", 25, 1.5),
        "interpolation": ("dpmpp_2m", 15, 1.5),
        "sr_low": ("ddim", 8, 1.0),
        "sr_high": ("ddim", 6, 1.0),
    },
    "paper": {
        "prior": ("ddim", 64, 1.0),
        "decoder": ("ddpm", 250, 1.0),
        "interpolation": ("ddpm", 250, 1.0),
        "sr_low": ("ddim", 27, 1.0),
        "sr_high": ("ddim", 15, 1.0),
    },
}


# What of a stage's settings leaves them to the preset.
OF_PRESET: dict[str, Any] = {"sampler": "", "steps": 0, "bend": 0.0}


@dataclass
class SamplingConfig:
    """How one stage is sampled."""

    sampler: str = ""  # ddpm | ddim | dpmpp_2m; empty = the preset's
    steps: int = 0  # of the sampler; 0 = the preset's
    guidance: float = 1.0  # classifier-free guidance, 1 = none
    rescale: float = 0.0  # share of guidance's wider range that is taken back, 0.7 in arXiv 2305.08891
    noise_level: int = -1  # super-resolution: diffusion time of the noise on the small clip, -1 = none
    bend: float = 0.0  # 1 = even times, above 1 closer ones near the clean sample (`Diffusion.times`); 0 = the preset's
    noise: str = "independent"  # of the frames at the start, but for SR_h, whose frames share all of it:
    # independent | mixed | progressive (arXiv 2305.10474)
    alpha: float = 1.0  # strength of what frames share in mixed (1 there) and progressive noise (2 there)


@dataclass
class CascadeConfig:
    """How a film is made."""

    preset: str = "paper"  # draft | standard | paper: samplers and steps that a stage does not name itself
    frames: int = 16  # of the decoder
    fps: float = 6.0  # of the decoder's clip; the film has fps * skip
    skip: int = 5  # interpolation puts skip - 1 frames into each gap: 16 -> 76
    candidates: int = 2  # embeddings drawn by the prior, of which the closest to the text is kept
    window: int = 16  # frames of an interpolation window, which share their end keyframes; 0 = all frames at once
    windows: int = 5  # interpolation windows that are sampled together
    tile: int = 16  # frames that a layer of SR_l^t works on at a time, two more on either side; 0 = all
    chunk: int = 8  # frames that SR_h works on at a time
    compile: bool = False  # torch.compile the networks: minutes, once, that many films on a GPU pay back
    prior: SamplingConfig = field(default_factory=SamplingConfig)
    decoder: SamplingConfig = field(default_factory=lambda: SamplingConfig(guidance=4.0))
    interpolation: SamplingConfig = field(default_factory=SamplingConfig)
    sr_low: SamplingConfig = field(default_factory=SamplingConfig)
    sr_high: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name in ("frames", "skip", "candidates", "windows", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"cascade.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.frames > 1000 or self.skip > 100:
            raise ValueError(f"cascade: {self.frames} frames at skip {self.skip} are too many: at most 1000 and 100.")
        if not 0.1 <= self.fps <= 1000:
            raise ValueError(f"cascade.fps is {self.fps}: give a rate in frames per second, 0.1 ... 1000, as 6.")
        for name in ("window", "tile"):
            if getattr(self, name) < 0:
                raise ValueError(f"cascade.{name} is {getattr(self, name)}: give a number of frames, or 0 for all.")
        for stage in STAGES:
            self.sampling(stage)

    def sampling(self, stage: str) -> SamplingConfig:
        """How a stage is sampled, with what it leaves to the preset.

        Raises ValueError for a preset, a sampler or a kind of noise that there is not, and for impossible numbers.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"cascade.preset '{self.preset}' is not one of {', '.join(PRESETS)}.")
        own: SamplingConfig = getattr(self, stage)
        sampler, steps, bend = PRESETS[self.preset][stage]
        found = replace(
            own,
            sampler=own.sampler or sampler,
            steps=own.steps or steps,
            bend=own.bend or (bend if own.sampler in ("", sampler) else 1.0),
        )
        if found.sampler not in SAMPLERS:
            raise ValueError(f"cascade.{stage}.sampler '{found.sampler}' is not one of {', '.join(SAMPLERS)}.")
        if found.noise not in NOISES:
            raise ValueError(f"cascade.{stage}.noise '{found.noise}' is not one of {', '.join(NOISES)}.")
        for key, value, right, words in (
            ("steps", found.steps, found.steps >= 1, "at least 1, or 0 for the preset's"),
            ("guidance", found.guidance, math.isfinite(found.guidance), "a number, as 4, and 1 is none"),
            ("rescale", found.rescale, 0 <= found.rescale <= 1, "a share, 0 ... 1"),
            ("noise_level", found.noise_level, found.noise_level >= -1, "a diffusion time, or -1 for no noise"),
            ("alpha", found.alpha, 0 <= found.alpha < math.inf, "a number from 0 up"),
        ):
            if not right:
                raise ValueError(f"cascade.{stage}.{key} is {value}: give {words}.")
        return found

    def resolved(self) -> "CascadeConfig":
        """The same with nothing left to the preset."""
        return replace(self, **{stage: self.sampling(stage) for stage in STAGES})  # type: ignore[arg-type]


def correlated(noise: Tensor, shared: Tensor, kind: str, alpha: float) -> Tensor:
    """Noise of frames that have something in common (PYoCo, arXiv 2305.10474, section 4.1).

    Each frame stays standard normal. In mixed noise any two frames have the covariance a^2 / (1 + a^2), in progressive
    noise (a / sqrt(1 + a^2))^|i - j|.

    Args:
        noise: `b c f h w`, independent.
        shared: `b c h w`, what all frames share (mixed alone).
    """
    if kind == "independent":
        return noise
    common, own = alpha / (1 + alpha**2) ** 0.5, 1 / (1 + alpha**2) ** 0.5
    if kind == "mixed":
        return common * shared.unsqueeze(2) + own * noise
    frames = list(noise.unbind(2))
    for i in range(1, len(frames)):
        frames[i] = common * frames[i - 1] + own * frames[i]
    return torch.stack(frames, dim=2)
