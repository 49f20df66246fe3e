"""The whole cascade, y = SR_h . SR_l^t . upF . D^t . P (BPE(x), CLIP_text(x)) (paper, eq. 1): a method per arrow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.clip import Clip, scaled
from models.diffusion import Diffusion, low_res_condition, split_variance
from models.samplers import SAMPLERS, Denoise, Draw, guided, seeded_draw, shared_over_frames

OnStep = Callable[[str, int, int], None]
"""Called after each network call of a sampler with (stage, calls made, calls in all)."""


@dataclass
class SamplingConfig:
    """How one stage is sampled."""

    sampler: str = "ddim"  # ddpm | ddim | dpmpp_2m
    steps: int = 50
    guidance: float = 1.0  # classifier-free guidance, 1 = none
    rescale: float = 0.0  # share of guidance's wider range that is taken back, 0.7 in arXiv 2305.08891
    noise_level: int = -1  # super-resolution: diffusion time of the noise on the small clip, -1 = none


@dataclass
class CascadeConfig:
    """How a film is made."""

    frames: int = 16  # of the decoder
    fps: float = 6.0  # of the decoder's clip; the film has fps * skip
    skip: int = 5  # interpolation puts skip - 1 frames into each gap: 16 -> 76
    candidates: int = 2  # embeddings drawn by the prior, of which the closest to the text is kept
    window: int = 16  # frames of an interpolation window, which share their end keyframes; 0 = all frames at once
    chunk: int = 8  # frames that SR_h works on at a time
    prior: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=64))
    decoder: SamplingConfig = field(default_factory=lambda: SamplingConfig(sampler="ddpm", steps=250, guidance=4.0))
    interpolation: SamplingConfig = field(default_factory=lambda: SamplingConfig(sampler="ddpm", steps=250))
    sr_low: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=27))
    sr_high: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15))


@dataclass
class Stage:
    """A trained network, the process it inverts, and the side in pixels of what it makes (0 for the prior)."""

    net: nn.Module
    diffusion: Diffusion
    size: int = 0


@dataclass
class Film:
    """What each arrow made; clips are `b 3 f h w` in [-1, 1], fps that of `interpolated` and what follows."""

    embedding: Tensor
    decoded: Tensor
    interpolated: Tensor
    low: Tensor
    high: Tensor
    fps: float


class MakeAVideo:
    """Text to video by five networks.

    Every method takes one seed for each sample: sample k does not depend on the batch it is in.

    Args:
        clip: the CLIP that the prior and the decoder were trained with.
        prior, decoder, interpolation, sr_low, sr_high: the five stages.
        device: where to compute; the networks are moved there.
        dtype: of autocast; float32 = none.
    """

    def __init__(
        self,
        clip: Clip,
        prior: Stage,
        decoder: Stage,
        interpolation: Stage,
        sr_low: Stage,
        sr_high: Stage,
        config: CascadeConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_step: OnStep | None = None,
    ):
        self.clip, self.config = clip, config
        self.prior, self.decoder, self.interpolation = prior, decoder, interpolation
        self.sr_low, self.sr_high = sr_low, sr_high
        self.device, self.dtype = torch.device(device), dtype
        self.on_step = on_step
        for stage in (prior, decoder, interpolation, sr_low, sr_high):
            stage.net.to(self.device).eval().requires_grad_(False)

    def text_to_video(self, prompts: Sequence[str], seeds: Sequence[int]) -> Film:
        """A film for each prompt. Raises ValueError for an empty prompt."""
        fps = self.config.fps
        embedding = self.embed(prompts, seeds)
        decoded = self.decode(embedding, fps, seeds)
        interpolated = self.interpolate(decoded, embedding, fps, seeds)
        low = self.upsample_low(interpolated, fps * self.config.skip, seeds)
        high = self.upsample_high(low, seeds)
        return Film(embedding, decoded, interpolated, low, high, fps * self.config.skip)

    def embed(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """P: the CLIP image embedding of each prompt `b d`, scaled; the best of `candidates` draws."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the prompt is empty: say in a few words what the film should show.")
        n = self.config.candidates
        tokens = self.clip.tokens(prompts).to(self.device)
        text = self.clip.encode_text(tokens)
        tokens, many = tokens.repeat_interleave(n, 0), scaled(text).repeat_interleave(n, 0)
        draw = seeded_draw([stream(s, "prior", i) for s in seeds for i in range(n)], many.shape[1:], self.device)

        def denoise(drop: bool) -> Denoise:
            flag = torch.full((len(many),), drop, device=self.device)
            return lambda z, t: (self.prior.net(z, t, tokens, many, drop=flag).float(), None)

        z = self.sample("prior", self.prior, denoise, draw)
        z = rearrange(z, "(b n) d -> b n d", n=n)
        closeness = torch.einsum("b n d, b d -> b n", nn.functional.normalize(z, dim=-1), text)
        best = z[torch.arange(len(z)), closeness.argmax(dim=1)]
        return scaled(nn.functional.normalize(best, dim=-1))

    def decode(self, embedding: Tensor, fps: float, seeds: Sequence[int], frames: int | None = None) -> Tensor:
        """D^t: embeddings `b d` to clips `b 3 f h w` of the decoder's size."""
        side = self.decoder.size
        draw = self.draw(seeds, "decoder", (3, frames or self.config.frames, side, side))
        return self.sample("decoder", self.decoder, self.with_embedding(self.decoder, embedding, fps), draw)

    def interpolate(self, clip: Tensor, embedding: Tensor, fps: float, seeds: Sequence[int]) -> Tensor:
        """upF: `skip - 1` new frames in each gap of a clip of `fps`; the given frames come back exactly."""
        skip, window = self.config.skip, self.config.window
        b, _, keyframes, h, w = clip.shape
        frames = (keyframes - 1) * skip + 1
        given = torch.zeros(b, 4, frames, h, w, device=self.device)
        given[:, :3, ::skip], given[:, 3, ::skip] = clip, 1
        draw = self.draw(seeds, "interpolation", (3, frames, h, w))
        # Windows of the training length share their end frames, which must be keyframes; else all at once.
        span = window - 1
        if window and span % skip == 0 and (frames - 1) % span == 0:
            n = (frames - 1) // span
            given = torch.cat([given[:, :, i * span : (i + 1) * span + 1] for i in range(n)])
            whole, embedding = draw, embedding.repeat(n, 1)

            def draw() -> Tensor:
                noise = whole()
                return torch.cat([noise[:, :, i * span : (i + 1) * span + 1] for i in range(n)])

        dense = self.sample(
            "interpolation",
            self.interpolation,
            self.with_embedding(self.interpolation, embedding, fps * skip, given=given),
            draw,
        )
        dense = torch.where(given[:, 3:] > 0, given[:, :3], dense)
        if len(dense) == b:
            return dense
        parts = dense.chunk(len(dense) // b)
        return torch.cat([*(part[:, :, :-1] for part in parts[:-1]), parts[-1]], dim=2)

    def upsample_low(self, clip: Tensor, fps: float, seeds: Sequence[int]) -> Tensor:
        """SR_l^t: all frames jointly in space and time."""
        draw = self.draw(seeds, "sr_low", (3, clip.shape[2], self.sr_low.size, self.sr_low.size))
        return self.upsample("sr_low", self.sr_low, clip, draw, fps)

    def upsample_high(self, clip: Tensor, seeds: Sequence[int]) -> Tensor:
        """SR_h: each frame alone, every frame from the same noise, `chunk` frames at a time."""
        side, chunk = self.sr_high.size, self.config.chunk
        chunks = clip.split(chunk, dim=2)
        done = []
        for i, part in enumerate(chunks):
            draw = shared_over_frames(self.draw(seeds, "sr_high", (3, side, side)), part.shape[2])
            done.append(self.upsample("sr_high", self.sr_high, part, draw, None, i, len(chunks)))
        return torch.cat(done, dim=2)

    def upsample(
        self, name: str, stage: Stage, clip: Tensor, draw: Draw, fps: float | None, part: int = 0, parts: int = 1
    ) -> Tensor:
        """Super-resolution of a clip by either network."""
        level = torch.full((len(clip),), getattr(self.config, name).noise_level, device=self.device)
        low = low_res_condition(clip.to(self.device), stage.size, stage.diffusion, level, draw())
        rate = None if fps is None else torch.full((len(clip),), fps, device=self.device)

        def denoise(drop: bool) -> Denoise:
            return pixel_denoiser(stage.net, stage.diffusion, low_res=low, noise_level=level.clamp(min=0), fps=rate)

        return self.sample(name, stage, denoise, draw, part, parts)

    def with_embedding(
        self, stage: Stage, embedding: Tensor, fps: float, **conditions: Tensor
    ) -> Callable[[bool], Denoise]:
        """The denoiser of a network conditioned on y_e and fps, with the embedding or (drop) without."""
        rate = torch.full((len(embedding),), fps, device=self.device)

        def denoise(drop: bool) -> Denoise:
            flag = torch.full((len(embedding),), drop, device=self.device)
            return pixel_denoiser(stage.net, stage.diffusion, embedding=embedding, drop=flag, fps=rate, **conditions)

        return denoise

    @torch.inference_mode()
    def sample(
        self, name: str, stage: Stage, denoise: Callable[[bool], Denoise], draw: Draw, part: int = 0, parts: int = 1
    ) -> Tensor:
        """Run a stage's sampler; `denoise(drop)` makes its denoiser with or without the condition."""
        config: SamplingConfig = getattr(self.config, name)
        if config.sampler not in SAMPLERS:
            raise ValueError(f"cascade.{name}.sampler '{config.sampler}' is not one of {', '.join(SAMPLERS)}.")
        times = stage.diffusion.times(config.steps, self.device)
        step, calls = guided(denoise(False), denoise(True), config.guidance, config.rescale), part * config.steps

        def counted(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal calls
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                x0, fraction = step(z, t)
            calls += 1
            if self.on_step is not None:
                self.on_step(name, calls, config.steps * parts)
            # after guidance, which would not be that of the network's predictions on clipped ones
            return (x0.clamp(-1, 1) if stage.size else x0), fraction

        return SAMPLERS[config.sampler](counted, draw(), times, draw)

    def draw(self, seeds: Sequence[int], name: str, shape: Sequence[int]) -> Draw:
        """Noise of each sample for one stage, from (seed, stage)."""
        return seeded_draw([stream(seed, name) for seed in seeds], shape, self.device)


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one stage's noise, so that no two stages of a film share theirs."""
    order = ("prior", "decoder", "interpolation", "sr_low", "sr_high").index(name)
    return (seed * 5 + order) * 1009 + index


def pixel_denoiser(net: nn.Module, diffusion: Diffusion, **conditions: Any) -> Denoise:
    """The denoiser of a pixel network under fixed conditions. Its x0 is not clipped: guidance comes first."""

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        prediction, fraction = split_variance(net(z, t, **conditions).float(), z.shape[1])
        return diffusion.to_x0(prediction, z, t), fraction

    return denoise
