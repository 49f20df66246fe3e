"""The schema of an experiment, and how a page of configs becomes one.

    config = schema <- the page it extends <- experiments/<size>.yaml <- command line

One page is one size of the whole cascade, a section for each stage, so that what must agree between stages is
seen in one place.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.clips import Curriculum, Keep
from datamodules.filters import FilterConfig
from lightning_modules.optim import OptimConfig
from models.cascade import CascadeConfig
from models.clip import ClipConfig
from models.diffusion import DiffusionConfig
from models.prior import PriorConfig
from models.sampling import OF_PRESET, STAGES
from models.unet import UNetConfig

PAGES = Path(__file__).parent


@dataclass
class TrainerConfig:
    """How long and on what a stage trains."""

    max_steps: int = 100_000
    batch_size: int = 32  # samples of one rank
    accumulate: int = 1  # batches per step
    precision: str = "auto"  # auto = bf16-mixed where the hardware has bf16, else 32-true; or Lightning's names
    accelerator: str = "auto"
    devices: str = "auto"  # on each machine
    strategy: str = "auto"  # auto | ddp | fsdp (weights, gradients, optimiser and average split over a machine's GPUs)
    workers: int = 2  # processes that read data
    clip_gradients: float = 1.0  # largest norm of the gradient, 0 = any
    ema_decay: float = 0.9999
    compile: bool = False  # torch.compile the network, in place
    log_every: int = 50  # steps
    sample_every: int = 5_000  # steps between pictures
    checkpoint_every: int = 5_000  # steps between checkpoints
    keep_checkpoints: int = 2  # how many stay; one holds 16 bytes per parameter, and writing takes room for one more
    max_nonfinite: int = 20  # steps in a row whose loss or gradient may be infinite or nan; one more stops the run
    preview: int = 8  # samples in a picture
    validate_every: int = 5_000  # steps between scores of D and D^t at fixed prompts (FVD, CLIPSIM), 0 = none
    validate: int = 16  # pictures or clips that are scored
    log_checkpoints: bool = False  # send checkpoints to W&B as artifacts
    peak_tflops: float = 0.0  # of one device, for the share of the peak; 0 = by its name, or measured


@dataclass
class StageConfig:
    """What every stage has."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    shards: list[str] = field(default_factory=list)  # pictures of this stage, all one set; none = data.shards


@dataclass
class ClipStage(StageConfig):
    """CLIP: frozen and pretrained in real runs; where `model.name` is empty, one of our own is trained first."""

    model: ClipConfig = field(default_factory=ClipConfig)


@dataclass
class PriorStage(StageConfig):
    """P, on images and captions."""

    model: PriorConfig = field(default_factory=PriorConfig)
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(prediction="x0"))
    drop: float = 0.1  # share of samples without text


@dataclass
class DecoderStage(StageConfig):
    """D, on images."""

    size: int = 64  # side in pixels
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    drop: float = 0.1  # share of samples without embedding


@dataclass
class VideoStage(StageConfig):
    """A stage on clips; its network is that of the image stage it starts from, with time."""

    frames: int = 16
    curriculum: Curriculum = field(default_factory=lambda: Curriculum(steps=100_000))  # of frame rates
    freeze_spatial: bool = False  # train the temporal layers alone (the paper says both)
    image_share: float = 0.0  # share of batches that are pictures of data.shards (arXiv 2204.03458; paper: none)
    clips: list[str] = field(default_factory=list)  # of this stage, several are one set; none = data.clips


@dataclass
class DecoderVideoStage(VideoStage):
    """D^t, from D, and upF, from D^t."""

    clip_frame: str = "first"  # whose CLIP embedding conditions a clip: first | middle | random | mean
    drop: float = 0.1


@dataclass
class SuperResolutionStage(StageConfig):
    """SR_l and SR_h, on images."""

    size: int = 256  # side in pixels of what it makes
    factor: int = 4  # size / side of what it takes
    crop: int = 64  # side of the training crops (unCLIP: a quarter)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(low_res=True, attention=[]))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    degradation: str = "blur"  # of the small image: blur | bsr, a random mix of blur, resizing, noise and JPEG
    blur: float = 0.6  # deviation of the Gaussian blur
    max_noise_level: int = 250  # the small image is noised to a random diffusion time below this
    finetune_on_video: bool = True  # does the stage go on with video? (SR_h: sources disagree; default on)


@dataclass
class DataConfig:
    """Where the data are. Stills with captions and clips without are separate sets."""

    shards: list[str] = field(default_factory=list)  # tar shards of img2dataset; {00000..00009}.tar is a range
    weights: list[float] = field(default_factory=list)  # of each of them in the mixture; none = all are one set
    filters: FilterConfig = field(default_factory=FilterConfig)  # on the metadata of images
    window: int = 0  # shards whose samples are shuffled together, 0 = all
    max_skipped: float = 0.5  # share of samples that may be unreadable before a run stops
    changed: bool = False  # go on from a checkpoint although the samples or their order are others since
    clips: str = ""  # videos: a folder, WebVid's CSV, tar shards of video2dataset, or HD-VILA's .jsonl
    clips_only: str = ""  # path of a list of clips' keys (WebVid's videoid), one a line: the others are left out
    clips_without: str = ""  # path of such a list: these are left out
    validation: str = ""  # clips with names that no stage trains on, for the scores; none = clips of the training set
    keep: Keep = field(default_factory=Keep)  # which clips are dropped for standing still or for a cut
    embeddings: bool = False  # train P and D from CLIP embeddings that `make embed` wrote beside the shards


@dataclass
class GenerateConfig:
    """Of `make generate` and the other uses: what is written."""

    formats: list[str] = field(default_factory=lambda: ["mp4"])  # mp4 | webm | gif | webp | png, a folder of frames
    size_out: int = 0  # side in pixels of the film, which ends with the stage that makes it; 0 = that of the last stage
    presentation: int = 512  # side of a smaller copy of a film that is larger, as in the paper; 0 = none


@dataclass
class EvaluateConfig:
    """Of the `make eval-...` commands."""

    clips: str = ""  # real clips, anything that data.clips may be; empty = data.clips
    prompts: str = ""  # .txt with one a line, .csv, .json or .jsonl; empty = the names in the CSV of the real clips
    prompt: str = "{}"  # how one of those names becomes a prompt; names are for evaluation alone
    generated: str = ""  # clips to score in place of generating some, anything that data.clips may be
    setting: str = ""  # of the row in a benchmark's table, as zero-shot; empty = zero-shot, where clips are generated
    folder: str = ""  # where generated clips are kept; empty = <runs>/<size>/evaluate/samples, ucf101 or msrvtt
    samples: int = 32  # generated clips, and real ones; 0 = one for each prompt
    batch_size: int = 8
    output: str = ""  # decoded | upsampled | interpolated | low | high; empty = upsampled for benchmarks, else decoded
    fps: float = 0.0  # of the decoder's clips, 0 = cascade.fps; real clips are read at the rate of the generated ones
    resolution: int = 0  # side that all clips are made before they are scored, 0 = that of the generated ones
    workers: int = 2  # processes that read clips
    devices: str = "auto"  # that generate, on each machine
    accelerator: str = "auto"
    ucf101: str = ""  # the folder with UCF-101/ and ucfTrainTestlist/
    ucf101_samples: int = 10_000
    msrvtt: str = ""  # the folder with test_videodatainfo.json and TestVideo/
    msrvtt_split: str = "test"  # of its videos: train | validate | test
    msrvtt_captions: str = "all"  # all, as in the paper, or one for each video, as in many later ones
    msrvtt_samples: int = 0  # the first so many of them, 0 = all
    i3d: str = ""  # path or address of the I3D weights; empty = a random network, and the number is called fvd_random
    i3d_sha256: str = ""
    c3d: str = ""  # of the C3D weights of IS, likewise, and
    c3d_sha256: str = ""
    c3d_mean: str = ""  # of the mean cube they were trained with
    c3d_mean_sha256: str = ""
    splits: int = 10  # of IS
    inception: str = ""  # of the Inception-v3 weights of FID, likewise
    inception_sha256: str = ""
    clip_name: str = ""  # open_clip model of CLIPSIM and CLIP-FID, as ViT-B-32; empty = the cascade's own CLIP
    clip_pretrained: str = ""  # its open_clip tag (downloaded), or path of a checkpoint


@dataclass
class Config:
    """One size of the whole cascade."""

    extends: str = ""  # another page, whose values these override
    size: str = ""  # the page's name, and
    page: str = ""  # what SIZE was: the name of a shipped page or the path of another; both set by `load`
    seed: int = 0
    runs: str = "runs"  # run folders are <runs>/<size>/<stage>
    pretrained: str = ""  # folder as `make export` writes them: the weights of stages that have not been trained here
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipStage = field(default_factory=ClipStage)
    prior: PriorStage = field(default_factory=PriorStage)
    decoder: DecoderStage = field(default_factory=DecoderStage)
    sr_low: SuperResolutionStage = field(default_factory=SuperResolutionStage)
    sr_high: SuperResolutionStage = field(default_factory=SuperResolutionStage)
    decoder_video: DecoderVideoStage = field(default_factory=DecoderVideoStage)
    sr_low_video: VideoStage = field(default_factory=VideoStage)
    sr_high_video: VideoStage = field(default_factory=VideoStage)
    interpolation: DecoderVideoStage = field(default_factory=DecoderVideoStage)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def sizes() -> list[str]:
    """Names of the shipped pages."""
    return sorted(path.stem for path in PAGES.glob("*.yaml"))


def load(size: str, overrides: list[str] | None = None, section: str = "") -> Config:
    """Read a page of configs.

    Args:
        size: name of a shipped page, or path of a YAML file.
        overrides: `key=value`; a key is looked up in `section` first, then at the top. With cascade.preset among them
            the samplers and steps of the page are left out, those of other overrides are not.
        section: the stage whose keys need no prefix.

    Raises:
        ValueError: a key that is not in the schema (names the nearest that is), a value of the wrong type.
        FileNotFoundError: no such page.
    """
    schema = OmegaConf.structured(Config)
    merged = OmegaConf.merge(schema, *pages(size, schema))
    assert isinstance(merged, DictConfig)
    merged.size, merged.page = Path(size).stem, size
    if any(override.startswith("cascade.preset=") for override in overrides or []):
        for stage in STAGES:  # a preset that is asked for wins over samplers and steps of the page
            merged.cascade[stage].update(OF_PRESET)
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"'{override}' is not of the form key=value, as in trainer.max_steps=100.")
        prefixed = bool(section) and key.split(".")[0] in merged[section]
        full = f"{section}.{override}" if prefixed else override
        try:
            change = OmegaConf.from_dotlist([full])
        except Exception as error:
            raise ValueError(f"'{override}' cannot be read as key=value: {error}") from None
        check_keys(change, schema, "the command line", short_names(schema[section], f"{section}.") if section else {})
        merged = merge(merged, change, "the command line")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"config '{size}': {first_line(error)}") from None
    assert isinstance(config, Config)
    return config


def pages(size: str, schema: DictConfig) -> list[DictConfig]:
    """The YAML files of a size, those it extends first."""
    path = Path(size) if size.endswith(".yaml") else PAGES / f"{size}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no page of configs '{size}': SIZE is one of {', '.join(sizes())}.")
    try:
        page = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(page, DictConfig):
        raise ValueError(f"{path}: a page of configs is a mapping of sections.")
    check_keys(page, schema, path.name, {})
    merge(schema, page, path.name)  # wrong types are found here, where the file is known
    base = page.get("extends")
    before = pages(base, schema) if base else []
    for each in before:  # weights are of the page that names them, not of one with other networks or data
        each.pop("pretrained", None)
    return [*before, page]


def merge(base: DictConfig, change: Any, where: str) -> DictConfig:
    """Merge with an error for people."""
    try:
        merged = OmegaConf.merge(base, change)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {getattr(error, 'full_key', '')}: {first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def check_keys(page: Any, schema: Any, where: str, hints: dict[str, str], path: str = "") -> None:
    """Raise ValueError for a key that the schema lacks, naming the nearest right one.

    `hints` maps further short names that a person may have meant to the whole keys they stand for.
    """
    if not isinstance(page, DictConfig) or not isinstance(schema, DictConfig) or OmegaConf.get_type(schema) is dict:
        return
    for key in map(str, page):
        name = f"{path}{key}"
        if key in schema:
            if not OmegaConf.is_interpolation(page, key):
                check_keys(page[key], schema[key], where, hints, f"{name}.")
            continue
        meant = {known: f"{path}{known}" for known in map(str, schema)}
        near = difflib.get_close_matches(key, meant, n=1, cutoff=0.6)
        if not near:
            meant = {**hints, **meant}
            near = difflib.get_close_matches(key, meant, n=1, cutoff=0.6)
        hint = f"did you mean '{meant[near[0]]}'?" if near else f"there are: {', '.join(map(str, schema))}."
        raise ValueError(f"{where}: there is no key '{name}'; {hint}")


def short_names(schema: DictConfig, prefix: str) -> dict[str, str]:
    """The last part of every key below a section -> the whole key; the shallower wins."""
    found: dict[str, str] = {}
    for key in map(str, schema):
        if isinstance(schema[key], DictConfig):
            found = {**short_names(schema[key], f"{prefix}{key}."), **found}
    return {**found, **{key: f"{prefix}{key}" for key in map(str, schema)}}


def first_line(error: Exception) -> str:
    """An OmegaConf error without its trailing lines of context."""
    return str(error).splitlines()[0]


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
