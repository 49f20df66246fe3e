"""Generated clips of a benchmark, kept as files: made once, by any number of processes, and gone on with after a kill.

Sample k is made of prompt k with the seed `sample_seed(seed, k)`, in the batch of the samples whose numbers divided by
the batch size have one quotient. So it does not depend on how many processes share the work, nor on what a kill left to
do; a batch of which one sample is missing is made again as a whole. Files are h264 in RGB with no loss (libx264rgb, qp
0): a lossy codec changes FVD. `manifest.json` beside them says what made them; samples of something else are refused.
"""

import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import lightning as L
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.video_sources import Clip
from experiments import build
from experiments.config import Config
from experiments.generate import make_cascade
from lightning_modules import parallel
from lightning_modules.media import as_bytes
from lightning_modules.metrics.weights import sha256_of
from lightning_modules.whole import whole
from models.cascade import MakeAVideo

OUTPUTS = {  # how far clips go through the cascade: the stages that make them
    "decoded": ("clip", "prior", "decoder_video"),
    "upsampled": ("clip", "prior", "decoder_video", "sr_low"),
    "interpolated": ("clip", "prior", "decoder_video", "interpolation"),
    "low": ("clip", "prior", "decoder_video", "interpolation", "sr_low"),
    "high": ("clip", "prior", "decoder_video", "interpolation", "sr_low", "sr_high"),
}


def clips_of(config: Config, maker: MakeAVideo, output: str, texts: list[str], seeds: list[int]) -> Tensor:
    """Generated clips as uint8 `b 3 f h w`, up to the stage that `output` names; of the first `cascade.frames`.

    `upsampled` is the decoder's frames through SR_l^t: 16 x 256 x 256 without interpolation.
    """
    fps = config.evaluate.fps or config.cascade.fps
    embedding = maker.embed(texts, seeds)
    clip = maker.decode(embedding, fps, seeds)
    if output not in ("decoded", "upsampled"):
        clip, fps = maker.interpolate(clip, embedding, fps, seeds), fps * config.cascade.skip
    if output in ("upsampled", "low", "high"):
        clip = maker.upsample_low(clip, fps, seeds)
    if output == "high":
        clip = maker.upsample_high(clip, seeds)
    clip = clip[:, :, : config.cascade.frames]  # as many frames from every stage: real clips are short
    return as_bytes(clip)


def rate(config: Config, output: str) -> float:
    """Frames a second of the clips."""
    fps = config.evaluate.fps or config.cascade.fps
    return fps * (1 if output in ("decoded", "upsampled") else config.cascade.skip)


class Sampling(L.LightningModule):
    """Makes the missing samples of a folder, of which each rank takes every world-th batch."""

    def __init__(self, config: Config, output: str, prompts: Sequence[str], folder: Path):
        super().__init__()
        self.config, self.output, self.prompts, self.folder = config, output, prompts, folder
        self.batches = missing(folder, len(prompts), config.evaluate.batch_size)
        self.maker: MakeAVideo | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer batches to do than ranks

    def setup(self, stage: str) -> None:
        self.maker = make_cascade(self.config)
        self.maker.on_step = None

    def predict_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = self.batches[rank::world]
        self.bar = tqdm(total=len(mine), desc="generating batches", file=sys.stderr, disable=rank > 0)
        return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: list[int], batch_idx: int) -> list[int]:
        assert self.maker is not None
        seeds = [sample_seed(self.config.seed, k) for k in batch]
        clips = clips_of(self.config, self.maker, self.output, [self.prompts[k] for k in batch], seeds).cpu()
        for k, clip in zip(batch, clips, strict=True):
            if not (path := self.folder / name(k)).exists():
                write_lossless(path, clip, rate(self.config, self.output))
        self.bar.update()
        return batch

    def on_predict_start(self) -> None:
        # Lightning would go on to the end. Files are whole or not there, so nothing is to be finished first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_predict_end(self) -> None:
        self.bar.close()


def sample_seed(seed: int, k: int) -> int:
    """The seed of sample k, below 2^48, of a run's seed: runs of other seeds have no noise in common.

    With `seed + k` the run of seed 1 would have the noise of seed 0, one sample on.
    """
    return int(np.random.SeedSequence((seed, k)).generate_state(1, np.uint64)[0]) >> 16


def name(k: int) -> str:
    """The file of sample k."""
    return f"{k:06d}.mp4"


def number_of(clip: Clip) -> int:
    """The sample that a file holds, by its name; of another name, one that no list has."""
    stem = Path(clip.key).stem
    return int(stem) if stem.isdecimal() else sys.maxsize


def missing(folder: Path, n: int, batch_size: int) -> list[list[int]]:
    """The batches of `n` samples of which not every one is there."""
    there = {path.name for path in folder.glob("*.mp4")}
    batches = [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
    return [batch for batch in batches if not all(name(k) in there for k in batch)]


def write_lossless(path: Path, clip: Tensor, fps: float) -> None:
    """Write a clip, uint8 `3 f h w`, whole or not at all; every byte comes back."""
    frames = rearrange(clip, "c f h w -> f h w c").contiguous().numpy()
    with whole(path) as part, av.open(str(part), "w", format="mp4") as container:
        # One thread: the bytes of the file, too, are then the same on any machine.
        options = {"qp": "0", "preset": "veryfast", "threads": "1"}
        video: Any = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001), options=options)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())


def made_of(config: Config, output: str) -> dict[str, str]:
    """What decides the pixels of a sample beside its prompt: a digest of each part, by its name."""
    cascade, parts, last = config.cascade.resolved(), dict[str, Any](), build.film_stages(config)
    for stage in OUTPUTS[output]:
        section: Any = build.section(config, stage)
        if stage == "clip" and config.clip.model.name:
            path = Path(config.clip.model.pretrained)
            parts[stage] = [asdict(config.clip.model), sha256_of(path) if path.is_file() else ""]
            continue
        parts[stage] = sha256_of(build.weights_path(config, last.get(stage, stage)))
        if stage != "clip":
            shape = config.prior.model if stage == "prior" else getattr(section, "unet", config.decoder.unet)
            size = getattr(section, "size", config.decoder.size)
            parts[f"network of {stage}"] = [asdict(shape), size, asdict(build.diffusion(config, stage).config)]
            stage = "decoder" if stage == "decoder_video" else stage
            parts[f"cascade.{stage}"] = asdict(getattr(cascade, stage))
    stages = ("prior", "decoder", "interpolation", "sr_low", "sr_high")
    parts["cascade"] = {key: value for key, value in asdict(cascade).items() if key not in (*stages, "preset")}
    parts["evaluate.output"], parts["frame rate"] = output, rate(config, output)
    parts["seed"] = sample_seed(config.seed, 0)  # a number that another rule for seeds changes
    parts["decoder.trainer.precision"] = build.precision(config.decoder.trainer.precision)
    return {part: short(value) for part, value in parts.items()}


def short(value: Any) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def claim(config: Config, output: str, prompts: Sequence[str], folder: Path) -> str:
    """Write the manifest of a folder of samples, or check that it is of these. Returns the digest of what made them.

    One list of prompts may be the beginning of the other: more samples join those that are there.
    Raises ValueError, which says what differs, where the samples are of something else.
    """
    parts, path, prompts = made_of(config, output), folder / "manifest.json", list(prompts)
    advice = "remove that folder, or write elsewhere with evaluate.folder=..."
    if path.is_file():
        old = read_manifest(folder)
        differ = [part for part in {**parts, **old["made_of"]} if parts.get(part) != old["made_of"].get(part)]
        if differ:
            raise ValueError(f"{folder} holds samples made with another {', '.join(differ)}; {advice}")
        n = min(len(prompts), len(old["prompts"]))
        if prompts[:n] != old["prompts"][:n]:
            k = next(k for k in range(n) if prompts[k] != old["prompts"][k])
            raise ValueError(
                f"{folder} holds samples of other prompts (sample {k} is of '{old['prompts'][k]}', not of "
                f"'{prompts[k]}'); {advice}"
            )
        prompts = max(prompts, old["prompts"], key=len)
    elif next(folder.glob("*.mp4"), None):
        raise ValueError(f"{folder} holds clips and no manifest.json that says what made them; {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    if parallel.first_rank():
        about = {"digest": short(parts), "seed": config.seed, "fps": rate(config, output), "output": output}
        with whole(path) as part:
            part.write_text(json.dumps({**about, "made_of": parts, "prompts": prompts}, indent=1))
    return short(parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known of a folder of samples; {} of a folder that is not ours. Raises ValueError for a damaged one."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
        assert isinstance(manifest["made_of"], dict) and isinstance(manifest["prompts"], list)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{path} is damaged: remove the folder, and its samples are made again.") from None
    return manifest


def generate(config: Config, output: str, prompts: Sequence[str], folder: Path) -> str:
    """Make the samples of a folder that are not there yet, on all ranks. Returns the digest of what made them.

    Raises as `claim` does, and FileNotFoundError where a stage has not been trained.
    """
    digest = claim(config, output, prompts, folder)
    module = Sampling(config, output, prompts, folder)
    if not module.batches:
        return digest
    trainer = L.Trainer(
        accelerator=config.evaluate.accelerator,
        devices=config.evaluate.devices,
        num_nodes=parallel.nodes(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # each rank has its own batches
    )
    try:
        trainer.predict(module, return_predictions=False, weights_only=True)
    except SystemExit:
        raise KeyboardInterrupt from None  # what Lightning makes of Ctrl-C
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():  # one process goes on and scores: its metrics are to wait for no other
        torch.distributed.destroy_process_group()
    return digest
