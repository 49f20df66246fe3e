"""The cascade as a folder: safetensors of CLIP and the five networks, and one JSON page of what they are.

The one module of `models` that reads and writes files, so that who has the weights needs nothing else of this
repository: no Lightning, no pages, no run folders.

    config.json              shapes, processes, settings of sampling, a SHA-256 of each set of weights, and of all
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

FORMAT = 3
VOCABULARY = "vocabulary.txt.gz"
TRAINING = ("dropout", "checkpoint_activations", "min_snr_gamma", "vlb_weight")  # what no film depends on


def save(maker: MakeAVideo, folder: str | Path, half: bool = False) -> None:
    """Write the cascade to a folder, over what was there, which stays as it was until all is written.

    Args:
        half: weights in float16, half the size; films are then of another model, with another digest.

    Raises ValueError for a CLIP that was not built from a `ClipConfig`.
    """
    if maker.clip.config is None:
        raise ValueError("this CLIP does not know its own shape: give Clip its config.")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    names = [*(f"{name}.safetensors" for name in networks(maker)), "config.json"]
    if not maker.clip.config.name:
        names.append(VOCABULARY)
    parts = {name: root / f"{name}.part" for name in names}
    found: dict[str, str] = {}
    try:
        for name, net in networks(maker).items():
            state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
            if half:
                state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            found[name] = digest(state)
            save_file(state, parts[f"{name}.safetensors"])
        what = shapes(maker)
        page = {"format": FORMAT, "model": together(found, what), "sha256": found, **what,
                "cascade": asdict(maker.config)}  # fmt: skip
        if VOCABULARY in parts:
            shutil.copyfile(default_bpe(), parts[VOCABULARY])
        parts["config.json"].write_text(json.dumps(page, indent=2) + "\n")
        for name, part in parts.items():
            part.replace(root / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
    config: CascadeConfig | None = None,
) -> MakeAVideo:
    """The cascade of a folder.

    Args:
        dtype: of the weights and of autocast: float32, or bfloat16 for half the memory.
        config: settings of sampling in place of the folder's.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file that is damaged, or not the one that the page was written with.
    """
    root = Path(folder)
    page = read_page(root)
    try:
        name = page["clip"]["name"]
        shape = ClipConfig(**page["clip"]["config"])
        mean, std = torch.tensor(page["clip"]["mean"]), torch.tensor(page["clip"]["std"])
        model = (
            open_clip.create_model(shape.name, force_quick_gelu=quick_gelu(shape)) if shape.name else build_clip(shape)
        )
        stages = {key: stage_of(page["stages"][key]) for key in STAGES}
        settings: Any = {k: SamplingConfig(**v) if isinstance(v, dict) else v for k, v in page["cascade"].items()}
        config = config or CascadeConfig(**settings)
        wanted: dict[str, str] = page["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{root / 'config.json'} is not the page of a model, or damaged ({error}).") from None
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
    clip.mean, clip.std = mean, std  # open_clip has those of a name with its pretrained weights alone
    maker = MakeAVideo(clip, **stages, config=config, device=device, dtype=dtype, on_step=on_step)
    maker.weights_digest = page["model"]
    return maker


def read_page(root: Path) -> dict[str, Any]:
    """What the `config.json` of such a folder says. FileNotFoundError without one, ValueError if it is damaged."""
    path = root / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no model in {root}: it has no config.json.")
    try:
        page: dict[str, Any] = json.loads(path.read_text())
        if page["format"] != FORMAT:
            raise ValueError(f"format {page['format']}, where {FORMAT} is known")
        if together(page["sha256"], page) != page["model"]:
            raise ValueError("its networks or processes have been edited since it was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the page of a model, or damaged ({error}).") from None
    return page


def load_weights(net: nn.Module, path: Path, sha256: str) -> None:
    """Fill a network from a file whose weights must be those of the digest."""
    if not path.is_file():
        raise FileNotFoundError(f"the model lacks {path}.")
    try:
        net.load_state_dict(read_weights(path, sha256))
    except RuntimeError as error:
        raise ValueError(f"{path} is of another network: {str(error).splitlines()[-1].strip()}") from None


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, those of the digest where one is given. ValueError for others, and for a damaged file."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    if sha256 is not None and digest(state) != sha256:
        raise ValueError(f"{path} is not the file that its config.json was written with.")
    return state


def weights_for(what: Stage | ClipConfig, path: Path) -> dict[str, Tensor]:
    """The weights in a file of such a folder. ValueError where they are not those of its page, or not of `what`."""
    page = read_page(path.parent)
    state = read_weights(path, page["sha256"][path.stem])
    if isinstance(what, ClipConfig):
        wanted, found = shape_of(what), page["clip"]["config"]
    else:
        wanted, found = for_films(description(what)), for_films(page["stages"][path.stem])
    wanted = json.loads(json.dumps(wanted))
    if differ := [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]:
        raise ValueError(f"{path} was trained with another {', '.join(differ)} than this config has.")
    return state


def networks(maker: MakeAVideo) -> dict[str, nn.Module]:
    """All six, CLIP first."""
    return {"clip": maker.clip.model, **{name: stage.net for name, stage in maker.stages().items()}}


def model_digest(maker: MakeAVideo) -> str:
    """Sixteen hex digits of the weights and of what else makes a film of them."""
    return together({name: digest(net.state_dict()) for name, net in networks(maker).items()}, shapes(maker))


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of weights: names, shapes and values, float16 as the float32 that they are, in the order of the names."""
    whole = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        value = value.float() if value.is_floating_point() else value
        whole.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def together(found: dict[str, str], what: dict[str, Any]) -> str:
    """One digest of all networks, sixteen hex digits: of their weights, and of their `shapes`.

    The same weights under another schedule, prediction or size make another film.
    """
    clip = {key: value for key, value in what["clip"].items() if key != "name"}
    text = json.dumps([[found[name] for name in ("clip", *STAGES)], for_films(clip), for_films(what["stages"])],
                      sort_keys=True)  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def for_films(values: Any) -> Any:
    """A description without what matters in training alone."""
    if not isinstance(values, dict):
        return values
    return {key: for_films(value) for key, value in values.items() if key not in TRAINING}


def shapes(maker: MakeAVideo) -> dict[str, Any]:
    """What CLIP and the stages are, but for their weights."""
    clip, config = maker.clip, maker.clip.config
    shape = None if config is None else shape_of(config)
    return {
        "clip": {"name": clip.name, "config": shape, "mean": clip.mean.tolist(), "std": clip.std.tolist()},
        "stages": {name: description(stage) for name, stage in maker.stages().items()},
    }


def shape_of(config: ClipConfig) -> dict[str, Any]:
    """CLIP's shape, without where its weights once lay."""
    return asdict(replace(config, pretrained="", sha256=""))


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
