"""The cascade as a folder: safetensors of CLIP and the five networks, and one JSON page of what they are.

The one module of `models` that reads and writes files, so that who has the weights needs nothing else of this
repository: no Lightning, no pages, no run folders.

    config.json              shapes, processes, settings of sampling, and a SHA-256 of each set of weights
    clip.safetensors         CLIP; prior, decoder, interpolation, sr_low, sr_high likewise
    vocabulary.txt.gz        the BPE vocabulary of CLIP's tokenizer
"""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.cascade import MakeAVideo, OnStep, Stage
from models.clip import Clip, ClipConfig, build_clip, quick_gelu
from models.diffusion import Diffusion, DiffusionConfig
from models.prior import Prior, PriorConfig
from models.sampling import STAGES, CascadeConfig, SamplingConfig
from models.unet import UNet, UNetConfig

FORMAT = 1
VOCABULARY = "vocabulary.txt.gz"


def save(maker: MakeAVideo, folder: str | Path, half: bool = False) -> None:
    """Write the cascade to a folder, over what was there.

    Args:
        half: weights in float16, half the size; films are then of another model, with another digest.

    Raises ValueError for a CLIP that was not built from a `ClipConfig`.
    """
    if maker.clip.config is None:
        raise ValueError("this CLIP does not know its own shape: give Clip its config.")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for name, net in networks(maker).items():
        state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
        if half:
            state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        found[name] = digest(state)
        save_file(state, root / f"{name}.safetensors")
    page = {
        "format": FORMAT,
        "model": together(found),
        "sha256": found,
        "clip": {"name": maker.clip.name, **asdict_of(maker.clip.config)},
        "stages": {name: description(stage) for name, stage in maker.stages().items()},
        "cascade": asdict(maker.config),
    }
    if not maker.clip.config.name:
        shutil.copyfile(default_bpe(), root / VOCABULARY)
    (root / "config.json").write_text(json.dumps(page, indent=2) + "\n")


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
) -> MakeAVideo:
    """The cascade of a folder.

    Args:
        dtype: of the weights and of autocast: float32, or bfloat16 for half the memory.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file that is damaged, or not the one that the page was written with.
    """
    root = Path(folder)
    path = root / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no model in {folder}: it has no config.json.")
    try:
        page = json.loads(path.read_text())
        if page["format"] != FORMAT:
            raise ValueError(f"format {page['format']}, where {FORMAT} is known")
        name = page["clip"].pop("name")
        shape = ClipConfig(**page["clip"].pop("config"))
        model = (
            open_clip.create_model(shape.name, force_quick_gelu=quick_gelu(shape)) if shape.name else build_clip(shape)
        )
        stages = {key: stage_of(page["stages"][key]) for key in STAGES}
        settings: Any = {k: SamplingConfig(**v) if isinstance(v, dict) else v for k, v in page["cascade"].items()}
        config = CascadeConfig(**settings)
        wanted: dict[str, str] = page["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the page of a model, or damaged ({error}).") from None
    for key, net in {"clip": model, **{key: stage.net for key, stage in stages.items()}}.items():
        load_weights(net, root / f"{key}.safetensors", wanted.get(key, ""))
        if dtype != torch.float32 and key != "clip":
            net.to(dtype)
    tokenizer: Any = None
    if shape.name:
        tokenizer = open_clip.get_tokenizer(shape.name)
    elif (root / VOCABULARY).is_file():
        tokenizer = SimpleTokenizer(str(root / VOCABULARY), context_length=shape.context_length)
    clip = Clip(model, name, tokenizer, shape)
    maker = MakeAVideo(clip, **stages, config=config, device=device, dtype=dtype, on_step=on_step)
    maker.weights_digest = together(wanted)
    return maker


def load_weights(net: nn.Module, path: Path, sha256: str) -> None:
    """Fill a network from a file whose weights must be those of the digest."""
    if not path.is_file():
        raise FileNotFoundError(f"the model lacks {path}.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    if digest(state) != sha256:
        raise ValueError(f"{path} is not the file that its config.json was written with.")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another network: {str(error).splitlines()[-1].strip()}") from None


def networks(maker: MakeAVideo) -> dict[str, nn.Module]:
    """All six, CLIP first."""
    return {"clip": maker.clip.model, **{name: stage.net for name, stage in maker.stages().items()}}


def digests(maker: MakeAVideo) -> dict[str, str]:
    """A SHA-256 of each network's weights."""
    return {name: digest(net.state_dict()) for name, net in networks(maker).items()}


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and bytes, in the order of the names."""
    whole = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        whole.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def together(found: dict[str, str]) -> str:
    """One digest of all networks, sixteen hex digits."""
    return hashlib.sha256("".join(found[name] for name in ("clip", *STAGES)).encode()).hexdigest()[:16]


def asdict_of(config: ClipConfig) -> dict[str, Any]:
    """CLIP's shape, without where its weights once lay."""
    return {"config": asdict(replace(config, pretrained="", sha256=""))}


def description(stage: Stage) -> dict[str, Any]:
    """What a stage is, but for its weights."""
    net: Any = stage.net
    kind = {"temporal": net.temporal, "masked": net.masked} if isinstance(net, UNet) else {}
    return {"network": asdict(net.config), **kind, "diffusion": asdict(stage.diffusion.config), "size": stage.size}


def stage_of(page: dict[str, Any]) -> Stage:
    """The inverse of `description`, with fresh weights."""
    process = Diffusion(DiffusionConfig(**page["diffusion"]))
    if "temporal" not in page:
        return Stage(Prior(PriorConfig(**page["network"])), process, page["size"])
    net = UNet(UNetConfig(**page["network"]), temporal=page["temporal"], masked=page["masked"])
    return Stage(net, process, page["size"])
