"""From a config to networks, data and modules: the table of the nine stages."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from torch import nn

from datamodules.image_text import ImageTextDataModule
from datamodules.video import VideoDataModule
from experiments.config import Config, StageConfig, SuperResolutionStage, VideoStage
from lightning_modules import parallel
from lightning_modules.clip import ClipModule
from lightning_modules.decoder import DecoderModule
from lightning_modules.interpolation import InterpolationModule
from lightning_modules.prior import PriorModule
from lightning_modules.super_resolution import SuperResolutionModule
from models import pretrained
from models.cascade import MakeAVideo, OnStep, Stage
from models.clip import Clip, build_clip, quick_gelu
from models.diffusion import Diffusion
from models.prior import Prior
from models.unet import UNet


@dataclass(frozen=True)
class Recipe:
    """One stage: the command that trains it, the stage it starts from, and whether it needs CLIP."""

    title: str
    command: str
    grows_from: str = ""
    needs_clip: bool = False


# In the order in which they are trained.
STAGES = {
    "clip": Recipe("CLIP", "train-clip"),
    "prior": Recipe("P", "train-prior", needs_clip=True),
    "decoder": Recipe("D", "train-decoder", needs_clip=True),
    "sr_low": Recipe("SR_l", "train-sr-low"),
    "sr_high": Recipe("SR_h", "train-sr-high"),
    "decoder_video": Recipe("D^t", "finetune-video", "decoder", needs_clip=True),
    "sr_low_video": Recipe("SR_l^t", "finetune-video STAGE=sr_low", "sr_low"),
    "sr_high_video": Recipe("SR_h on video", "finetune-video STAGE=sr_high", "sr_high"),
    "interpolation": Recipe("upF", "train-interpolation", "decoder_video", needs_clip=True),
}


def wanted(config: Config) -> list[str]:
    """The stages that this config trains: not CLIP if it names a pretrained one, not what it switches off."""
    skipped = {
        "clip": bool(config.clip.model.name),
        "sr_low_video": not config.sr_low.finetune_on_video,
        "sr_high_video": not config.sr_high.finetune_on_video,
    }
    return [stage for stage in STAGES if not skipped.get(stage)]


def run_folder(config: Config, stage: str) -> Path:
    """`<runs>/<size>/<stage>`."""
    return Path(config.runs) / config.size / stage


def section(config: Config, stage: str) -> StageConfig:
    """The stage's section of the config."""
    if stage not in STAGES:
        raise ValueError(f"there is no stage '{stage}': it is one of {', '.join(STAGES)}.")
    return getattr(config, stage)


def network(config: Config, stage: str) -> nn.Module:
    """The network of a stage, with fresh weights."""
    if stage == "clip":
        return build_clip(config.clip.model)
    if stage == "prior":
        return Prior(replace(config.prior.model, embedding_width=config.clip.model.embedding_width))
    if stage in ("decoder", "decoder_video", "interpolation"):
        shape = replace(config.decoder.unet, embedding_width=config.clip.model.embedding_width)
        return UNet(shape, temporal=stage != "decoder", masked=stage == "interpolation")
    shape = replace(super_resolution(config, stage).unet, low_res=True)
    if shape.residual and diffusion(config, stage).config.prediction != "x0":
        raise ValueError(f"{stage}: unet.residual needs diffusion.prediction=x0, as it adds to the small picture.")
    return UNet(shape, temporal=stage == "sr_low_video")


def super_resolution(config: Config, stage: str) -> SuperResolutionStage:
    """The section that shapes a super-resolution stage, for images and video alike."""
    return config.sr_low if stage.startswith("sr_low") else config.sr_high


def diffusion(config: Config, stage: str) -> Diffusion:
    """The diffusion of a stage: a video stage has that of its image stage."""
    if stage == "prior":
        return Diffusion(config.prior.diffusion)
    decoder = stage in ("decoder", "decoder_video", "interpolation")
    return Diffusion(config.decoder.diffusion if decoder else super_resolution(config, stage).diffusion)


def module(config: Config, stage: str, net: nn.Module, clip: Clip | None) -> L.LightningModule:
    """The LightningModule of a stage."""
    part: Any = section(config, stage)
    if isinstance(part, VideoStage) and part.image_share and part.freeze_spatial:
        raise ValueError(f"{stage}: pictures teach the spatial layers, which freeze_spatial holds still: "
                         "set image_share=0 or freeze_spatial=false.")  # fmt: skip
    if stage == "clip":
        return ClipModule(net, part.optim)
    if stage.startswith("sr_"):
        shape = super_resolution(config, stage)
        assert isinstance(net, UNet)
        return SuperResolutionModule(
            net,
            diffusion(config, stage),
            part.optim,
            factor=shape.factor,
            blur=shape.blur,
            max_noise_level=shape.max_noise_level,
            freeze_spatial=getattr(part, "freeze_spatial", False) and net.temporal,
            degradation=shape.degradation,
        )
    assert clip is not None
    if stage == "prior":
        return PriorModule(net, diffusion(config, stage), clip, part.optim, part.drop)
    assert isinstance(net, UNet)
    if stage == "decoder":
        return DecoderModule(net, diffusion(config, stage), clip, part.optim, config.decoder.size, drop=part.drop)
    kind = InterpolationModule if stage == "interpolation" else DecoderModule
    return kind(
        net,
        diffusion(config, stage),
        clip,
        part.optim,
        config.decoder.size,
        clip_frame=part.clip_frame,
        drop=part.drop,
        freeze_spatial=part.freeze_spatial,
    )


def strategy(part: StageConfig) -> str:
    """Lightning's strategy for a stage. DDP must be told that pictures leave the temporal layers without gradients."""
    name, devices = part.trainer.strategy, part.trainer.devices
    several = parallel.nodes() > 1 or (torch.cuda.device_count() > 1 if devices == "auto" else devices != "1")
    joint = isinstance(part, VideoStage) and part.image_share > 0
    return "ddp_find_unused_parameters_true" if joint and (name == "ddp" or (name == "auto" and several)) else name


def datamodule(config: Config, stage: str, clip: Clip | None = None) -> ImageTextDataModule | VideoDataModule:
    """The data of a stage; CLIP and P alone are given captions. `clip` is whose embeddings may come with them."""
    part = section(config, stage)
    if stage.startswith("sr_"):
        shape = super_resolution(config, stage)
        resolution, crop = shape.size, shape.crop if shape.crop < shape.size else None
    else:
        # CLIP must see the same pictures in every stage: the decoder's are made smaller after it has read them.
        decoder = stage not in ("clip", "prior")
        resolution, crop = max(config.clip.model.image_size, config.decoder.size if decoder else 0), None
    if isinstance(part, VideoStage):
        clips = part.clips or [config.data.clips]
        if not all(clips):
            raise ValueError("data.clips is empty: name the folder with the clips and their CSV.")
        return VideoDataModule(
            clips,
            part.trainer.batch_size,
            part.frames,
            resolution,
            crop,
            curriculum=part.curriculum,
            seed=config.seed,
            workers=part.trainer.workers,
            keep=config.data.keep,
            max_skipped=config.data.max_skipped,
            window=config.data.window,
            changed=config.data.changed,
            images=stills(config, part, resolution, crop) if part.image_share else None,
            image_share=part.image_share,
            only=config.data.clips_only,
            without=config.data.clips_without,
        )
    embedded = clip.name if clip is not None and config.data.embeddings else ""
    if embedded:
        # CLIP has read the pictures already: the prior needs none, the decoder its own size.
        resolution = config.decoder.size if stage == "decoder" else 0
    return stills(config, part, resolution, crop, clip=embedded, text=stage in ("clip", "prior"))


def stills(
    config: Config, part: StageConfig, resolution: int, crop: int | None, clip: str = "", text: bool = False
) -> ImageTextDataModule:
    """The captioned images; without `text` no caption is read."""
    shards = part.shards or config.data.shards
    if not shards:
        raise ValueError("data.shards is empty: name the tar shards of captioned images.")
    return ImageTextDataModule(
        shards,
        part.trainer.batch_size,
        resolution,
        crop,
        config.seed,
        part.trainer.workers,
        clip=clip,
        weights=() if part.shards else config.data.weights,
        filters=config.data.filters,
        max_skipped=config.data.max_skipped,
        window=config.data.window,
        text=text,
        changed=config.data.changed,
    )


def film_stages(config: Config) -> dict[str, str]:
    """Networks of the cascade, CLIP first -> the stages that train them last."""
    low = "sr_low_video" if config.sr_low.finetune_on_video else "sr_low"
    high = "sr_high_video" if config.sr_high.finetune_on_video else "sr_high"
    return {"clip": "clip", "prior": "prior", "decoder": "decoder_video", "interpolation": "interpolation",
            "sr_low": low, "sr_high": high}  # fmt: skip


def weights_path(config: Config, stage: str) -> Path:
    """Where the averaged weights of a stage are: in its run folder, else, as if it had been trained, in `pretrained`.

    Not in the latter once a CLIP has been trained here, as the others were trained with theirs. Raises
    FileNotFoundError, which names the command to run, where there are none.
    """
    path = run_folder(config, stage) / "weights.safetensors"
    if path.is_file():
        return path
    told, shipped = "", shipped_path(config, stage)
    if shipped is not None:
        own_clip = run_folder(config, "clip") / "weights.safetensors"
        if not own_clip.is_file():
            return shipped
        told = f" Those of {config.pretrained} belong to another CLIP than {own_clip}: remove that to use them."
    command = f"make {STAGES[stage].command} SIZE={config.page}"
    raise FileNotFoundError(f"there are no trained weights of stage '{stage}' at {path}: run `{command}` first.{told}")


def shipped_path(config: Config, stage: str) -> Path | None:
    """The file that `pretrained` has for a stage, None where it has none."""
    files = {last: Path(config.pretrained) / f"{name}.safetensors" for name, last in film_stages(config).items()}
    return files[stage] if config.pretrained and stage in files and files[stage].is_file() else None


def weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a finished stage.

    Raises as `weights_path`, and ValueError for a damaged file, and for one of `pretrained` that is of another network
    or process than the config's.
    """
    path = weights_path(config, stage)
    if path != shipped_path(config, stage):
        return pretrained.read_weights(path)
    if stage == "clip":
        return pretrained.weights_for(config.clip.model, path)
    with torch.device("meta"):
        net = network(config, stage)
    size = getattr(section(config, "decoder" if path.stem == "interpolation" else path.stem), "size", 0)
    return pretrained.weights_for(Stage(net, diffusion(config, stage), size), path)


def load_clip(config: Config) -> Clip:
    """The frozen CLIP: a pretrained open_clip model if the config names one, else our own from its run folder.

    Raises:
        ValueError: an unknown name, a wrong checksum, or an embedding width that disagrees with the config.
    """
    model = config.clip.model
    if not model.name:
        net, state = build_clip(model), weights(config, "clip")
        net.load_state_dict(state)
        return Clip(net, f"ours-{config.size}-{digest(state)}", config=model)
    if not model.pretrained:
        raise ValueError("clip.model.pretrained is empty: give open_clip's tag, or the path of a checkpoint.")
    if model.sha256:
        found = hashlib.sha256(Path(model.pretrained).read_bytes()).hexdigest()
        if found != model.sha256:
            raise ValueError(f"{model.pretrained} has SHA-256 {found}, the config says {model.sha256}.")
    try:
        net = open_clip.create_model(model.name, pretrained=model.pretrained, force_quick_gelu=quick_gelu(model))
    except RuntimeError as error:
        raise ValueError(f"clip.model: {str(error).splitlines()[0]}") from None
    width = net.text_projection.shape[-1] if hasattr(net, "text_projection") else model.embedding_width
    if width != model.embedding_width:
        raise ValueError(f"{model.name} has embeddings of {width}, clip.model.embedding_width says otherwise.")
    return Clip(net, f"{model.name}/{model.pretrained}", open_clip.get_tokenizer(model.name), model)


def digest(state: dict[str, torch.Tensor]) -> str:
    """Eight hex digits that tell one set of weights from another."""
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(key.encode())
        whole.update(state[key].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:8]


def cascade(
    config: Config, device: str = "cpu", dtype: torch.dtype = torch.float32, on_step: OnStep | None = None
) -> MakeAVideo:
    """The five trained networks of a size, ready to make films."""

    def stage(name: str, size: int = 0) -> Stage:
        net = network(config, name)
        net.load_state_dict(weights(config, name))
        return Stage(net, diffusion(config, name), size)

    last = film_stages(config)
    return MakeAVideo(
        load_clip(config),
        prior=stage("prior"),
        decoder=stage("decoder_video", config.decoder.size),
        interpolation=stage("interpolation", config.decoder.size),
        sr_low=stage(last["sr_low"], config.sr_low.size),
        sr_high=stage(last["sr_high"], config.sr_high.size),
        config=config.cascade,
        device=device,
        dtype=dtype,
        on_step=on_step,
    )


def precision(name: str) -> str:
    """Lightning's precision for `auto`: bf16-mixed where bf16 is fast, else 32-true."""
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def device() -> str:
    """The accelerator of this process, among those of one machine that torchrun or SLURM has started, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % torch.cuda.device_count()}"


def summary(config: Config, stage: str) -> dict[str, Any] | None:
    """What a finished stage left of itself (`summary.json`), None if it has not finished."""
    path = run_folder(config, stage) / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def finished(config: Config, stage: str) -> bool:
    """Has the stage trained as many steps as the config asks for?"""
    result = summary(config, stage)
    steps = section(config, stage).trainer.max_steps
    return (
        result is not None
        and result["steps"] >= steps
        and (run_folder(config, stage) / "weights.safetensors").is_file()
    )
