"""The whole cascade, y = SR_h . SR_l^t . upF . D^t . P (BPE(x), CLIP_text(x)) (paper, eq. 1): a method per arrow."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from models.clip import Clip, scaled
from models.diffusion import low_res_condition
from models.samplers import SAMPLERS, Denoise, Draw, guided, guided_at_once, seeded_draw, shared_over_frames
from models.sampling import STAGES, CascadeConfig, SamplingConfig, correlated
from models.stages import (
    STOPS,
    Denoisers,
    Film,
    OnStep,
    Stage,
    again,
    at_once_pays,
    check_seeds,
    check_stop,
    pixel_denoiser,
    stream,
    windows,
)
from models.tiles import tileable

__all__ = [
    "STOPS",
    "CascadeConfig",
    "Film",
    "MakeAVideo",
    "OnStep",
    "SamplingConfig",
    "Stage",
    "pixel_denoiser",
    "stream",
]


class MakeAVideo:
    """Text to video by five networks. What else they can make of pictures and clips is in `models.uses`.

    Every method takes one seed for each sample: sample k does not depend on the batch it is in, nor on the chunks it
    is made in, but for rounding.

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
        self.weights_digest = ""
        self.most_frames: dict[str, int] = {}  # that a layer of a stage has worked on at a time
        for stage in self.stages().values():
            stage.net.to(self.device).eval().requires_grad_(False)
            if config.compile:
                stage.net.compile()
        for name in STAGES:
            self.sampling(name)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_step: OnStep | None = None,
        config: CascadeConfig | None = None,
    ) -> "MakeAVideo":
        """The cascade of a folder that `save_pretrained` wrote; see `models.pretrained.load`."""
        from models.pretrained import load  # which builds one of these

        return load(folder, device, dtype, on_step, config)

    def save_pretrained(self, folder: str, half: bool = False) -> None:
        """Write the cascade to a folder; see `models.pretrained.save`."""
        from models.pretrained import save

        save(self, folder, half)

    def digest(self) -> str:
        """Sixteen hex digits that tell these weights, shapes and processes from others; computed once."""
        if not self.weights_digest:
            from models.pretrained import model_digest

            self.weights_digest = model_digest(self)
        return self.weights_digest

    def stages(self) -> dict[str, Stage]:
        """The five stages by name."""
        return {name: getattr(self, name) for name in STAGES}

    def sampling(self, name: str) -> SamplingConfig:
        """How a stage is sampled. Raises ValueError for more steps, or more noise, than its process has."""
        found, steps = self.config.sampling(name), getattr(self, name).diffusion.config.steps
        if found.steps > steps or found.noise_level >= steps:
            raise ValueError(f"cascade.{name} has {found.steps} steps and noise_level {found.noise_level}, and its "
                             f"diffusion has {steps}: at most {steps} and {steps - 1}.")  # fmt: skip
        return found

    def text_to_video(
        self, prompts: Sequence[str], seeds: Sequence[int], stop: str = "high", intermediates: bool = True
    ) -> Film:
        """A film for each prompt, as far as `stop` (embedding, decoded, interpolated, low, high).

        Without `intermediates` the last clip alone is kept. Raises ValueError for an empty prompt, an unknown stop, and
        where there is not a seed for each prompt.
        """
        check_stop(stop, STOPS)
        fps = self.config.fps
        film = Film(self.embed(prompts, seeds), fps=fps * self.config.skip, decoded_fps=fps)
        if stop == "embedding":
            return film
        return self.finish(replace(film, decoded=self.decode(film.embedding, fps, seeds)), seeds, stop, intermediates)

    def finish(self, film: Film, seeds: Sequence[int], stop: str = "high", intermediates: bool = True) -> Film:
        """The stages that follow `decoded` (or `interpolated`, where the film has it), as far as `stop`."""
        check_stop(stop)
        clips = film.clips()
        end = STOPS.index(stop)
        for name in STOPS[2 : end + 1]:
            if name in clips:
                continue
            before = clips[STOPS[STOPS.index(name) - 1]]
            if name == "interpolated":
                clips[name] = self.interpolate(before, film.embedding, film.decoded_fps, seeds)
            elif name == "low":
                clips[name] = self.upsample_low(before, film.fps, seeds)
            else:
                clips[name] = self.upsample_high(before, seeds)
            if not intermediates:
                clips = {name: clips[name]}
        return Film(film.embedding, fps=film.fps, decoded_fps=film.decoded_fps, **clips)

    def embed(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """P: the CLIP image embedding of each prompt `b d`, scaled; the best of `candidates` draws."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the prompt is empty: say in a few words what the film should show.")
        check_seeds(seeds, len(prompts))
        n = self.config.candidates
        tokens = self.clip.tokens(prompts).to(self.device)
        text = self.clip.encode_text(tokens)
        tokens, many = tokens.repeat_interleave(n, 0), scaled(text).repeat_interleave(n, 0)
        draw = seeded_draw([stream(s, "prior", i) for s in seeds for i in range(n)], many.shape[1:], self.device)

        def denoisers(drops: Sequence[bool]) -> Denoise:
            words, sense, flag = again(tokens, drops), again(many, drops), self.flags(drops, len(many))
            return lambda z, t: (self.prior.net(z, t, words, sense, drop=flag).float(), None)

        z = self.sample("prior", self.prior, denoisers, draw)
        z = rearrange(z, "(b n) d -> b n d", n=n)
        closeness = torch.einsum("b n d, b d -> b n", nn.functional.normalize(z, dim=-1), text)
        best = z[torch.arange(len(z)), closeness.argmax(dim=1)]
        return scaled(nn.functional.normalize(best, dim=-1))

    def decode(self, embedding: Tensor, fps: float, seeds: Sequence[int], frames: int | None = None) -> Tensor:
        """D^t: embeddings `b d` to clips `b 3 f h w` of the decoder's size."""
        check_seeds(seeds, len(embedding))
        side, frames = self.decoder.size, self.config.frames if frames is None else frames
        if not 1 <= frames <= 1000:
            raise ValueError(f"a clip of {frames} frames cannot be made: ask for 1 ... 1000, the paper's is 16.")
        draw = self.start("decoder", self.draw(seeds, "decoder", (3, frames, side, side)))
        return self.sample("decoder", self.decoder, self.with_embedding(self.decoder, embedding, fps), draw)

    def complete(
        self, clip: Tensor, known: Tensor, embedding: Tensor, fps: float, seeds: Sequence[int], turn: int = 1
    ) -> Tensor:
        """upF on any given frames of a clip `b 3 f h w` of the decoder's size; they come back exactly.

        Args:
            known: which frames are given, bool `f`; the others are not looked at.
            fps: of the clip.
            turn: 1 ... 1000, for calls on one film that are to have noise of their own.
        """
        check_seeds(seeds, len(clip))
        draw = self.start("interpolation", self.draw(seeds, "interpolation", (3, *clip.shape[2:]), turn))
        mask = known.to(self.device).float()[:, None, None].expand(len(clip), 1, -1, *clip.shape[3:])
        given = torch.cat((torch.where(mask > 0, clip.to(self.device), 0.0), mask), dim=1)
        return self.fill(given, embedding, fps, draw)

    def interpolate(self, clip: Tensor, embedding: Tensor, fps: float, seeds: Sequence[int]) -> Tensor:
        """upF: `skip - 1` new frames in each gap of a clip of `fps`; the given frames come back exactly.

        In windows of the training length, which share their end frames, `windows` at a time; what remains of a film
        that they do not divide is a shorter window.
        """
        check_seeds(seeds, len(clip))
        skip, b, frames = self.config.skip, len(clip), (clip.shape[2] - 1) * self.config.skip + 1
        given = torch.zeros(b, 4, frames, *clip.shape[3:], device=self.device)
        given[:, :3, ::skip], given[:, 3, ::skip] = clip.to(self.device), 1
        groups = windows(frames, self.config.window, skip, self.config.windows)
        parts: list[Tensor] = []
        for i, group in enumerate(groups):
            # of the whole film, so that frames of one window share their noise with those of the next
            whole = self.start("interpolation", self.draw(seeds, "interpolation", (3, frames, *clip.shape[3:])))

            def draw(whole: Draw = whole, group: list[tuple[int, int]] = group) -> Tensor:
                noise = whole()
                return torch.cat([noise[:, :, a:e] for a, e in group])

            known = torch.cat([given[:, :, a:e] for a, e in group])
            dense = self.fill(known, again(embedding, group), fps * skip, draw, i, len(groups))
            parts += dense.chunk(len(group))
        return torch.cat([*(part[:, :, :-1] for part in parts[:-1]), parts[-1]], dim=2)

    def fill(self, given: Tensor, embedding: Tensor, fps: float, draw: Draw, part: int = 0, parts: int = 1) -> Tensor:
        """upF on masked frames and their mask `b 4 f h w`."""
        denoisers = self.with_embedding(self.interpolation, embedding, fps, given=given)
        made = self.sample("interpolation", self.interpolation, denoisers, draw, part, parts)
        return torch.where(given[:, 3:] > 0, given[:, :3], made)

    def upsample_low(self, clip: Tensor, fps: float, seeds: Sequence[int]) -> Tensor:
        """SR_l^t: all frames jointly in space and time, `tile` of them at a time in each layer."""
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
        level = torch.full((len(clip),), self.sampling(name).noise_level, device=self.device)
        low = low_res_condition(clip.to(self.device), stage.size, stage.diffusion, level, draw())
        rate = None if fps is None else torch.full((len(clip),), fps, device=self.device)
        tile = {} if fps is None else {"tile": self.config.tile}

        def denoisers(drops: Sequence[bool]) -> Denoise:
            conditions = {"low_res": low, "noise_level": level.clamp(min=0), "fps": rate}
            return pixel_denoiser(
                stage.net, stage.diffusion, **{k: again(v, drops) for k, v in conditions.items()}, **tile
            )

        return self.sample(name, stage, denoisers, self.start(name, draw), part, parts)

    def with_embedding(self, stage: Stage, embedding: Tensor, fps: float, **conditions: Tensor) -> Denoisers:
        """The denoisers of a network conditioned on y_e and fps, with the embedding or (drop) without."""
        embedding = embedding.to(self.device)
        rate = torch.full((len(embedding),), fps, device=self.device)

        def denoisers(drops: Sequence[bool]) -> Denoise:
            return pixel_denoiser(
                stage.net,
                stage.diffusion,
                embedding=again(embedding, drops),
                drop=self.flags(drops, len(embedding)),
                fps=again(rate, drops),
                **{name: again(value, drops) for name, value in conditions.items()},
            )

        return denoisers

    @torch.inference_mode()
    def sample(
        self, name: str, stage: Stage, denoisers: Denoisers, draw: Draw, part: int = 0, parts: int = 1
    ) -> Tensor:
        """Run a stage's sampler. A GPU makes both halves of guidance in one call; a CPU gains nothing by it."""
        config = self.sampling(name)
        times = stage.diffusion.times(config.steps, self.device, config.bend)
        once = config.guidance != 1 and at_once_pays(self.device)
        if once:
            step = guided_at_once(denoisers([False, True]), config.guidance, config.rescale)
        else:
            step = guided(denoisers([False]), denoisers([True]), config.guidance, config.rescale)
        made = part * config.steps

        def counted(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal made
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                x0, fraction = step(z, t)
            made += 1
            if self.on_step is not None:
                self.on_step(name, made, config.steps * parts)
            # after guidance, which would not be that of the network's predictions on clipped ones
            return (x0.clamp(-1, 1) if stage.size else x0), fraction

        z = draw()
        if stage.size:
            tile = self.config.tile if name == "sr_low" and tileable(stage.net) else 0
            at_once = min(z.shape[2], tile + 4) if tile else z.shape[2]
            self.most_frames[name] = max(self.most_frames.get(name, 0), len(z) * at_once * (1 + once))
        return SAMPLERS[config.sampler](counted, z, times, draw)

    def start(self, name: str, draw: Draw) -> Draw:
        """The noise of a clip `b c f h w`, of which frames have in common what the stage's settings say at first alone.

        SR_h's frames share all of their noise as it is.
        """
        config = self.config.sampling(name)
        if config.noise == "independent" or name == "sr_high":
            return draw
        begun = False

        def drawn() -> Tensor:
            nonlocal begun
            if begun:
                return draw()
            begun = True
            return correlated(draw(), draw()[:, :, 0], config.noise, config.alpha)

        return drawn

    def flags(self, drops: Sequence[bool], n: int) -> Tensor:
        """Each flag for a whole batch of n."""
        return torch.tensor(drops, device=self.device).repeat_interleave(n)

    def draw(self, seeds: Sequence[int], name: str, shape: Sequence[int], turn: int = 0) -> Draw:
        """Noise of each sample for one stage, from (seed, stage, turn)."""
        return seeded_draw([stream(seed, name, turn) for seed in seeds], shape, self.device)
