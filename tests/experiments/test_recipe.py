"""The recipe: what every stage sees and learns from, as the paper (sections 5 and 6 of its reading) and unCLIP have it.

What neither publishes is the pages' own affair and not held here.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange

from datamodules.video import Clips
from experiments import build
from experiments.config import Config, load, sizes
from experiments.train import train
from lightning_modules.decoder import DecoderModule
from lightning_modules.interpolation import InterpolationModule, random_masks
from lightning_modules.super_resolution import SuperResolutionModule
from models.clip import scaled
from models.unet import UNet

IMAGE = ["prior", "decoder", "sr_low", "sr_high"]
VIDEO = ["decoder_video", "sr_low_video", "sr_high_video", "interpolation"]
REAL = [size for size in sizes() if size not in ("tiny", "emoji")]  # these have recipes of minutes and hours
RANKS = 64  # on which the page `paper` has unCLIP's batches

# unCLIP (arXiv 2204.06125), table 3 of appendix C, and the sampler of each stage there.
UNCLIP: dict[str, dict[str, Any]] = {
    "prior": {"lr": 1.1e-4, "beta2": 0.96, "eps": 1e-6, "weight_decay": 6e-2, "batch": 4096, "iterations": 600_000,
              "schedule": "cosine", "steps": 64, "width": 2048, "depth": 24, "heads": 32},
    "decoder": {"lr": 1.2e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0, "batch": 2048, "iterations": 800_000,
                "schedule": "cosine", "steps": 250, "sampler": "ddpm", "blocks": 3, "multiples": [1, 2, 3, 4],
                "attention": [32, 16, 8], "dropout": 0.1},
    "sr_low": {"lr": 1.2e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0, "batch": 1024, "iterations": 1_000_000,
               "schedule": "cosine", "steps": 27, "sampler": "ddim", "blocks": 3, "multiples": [1, 2, 3, 4],
               "attention": [], "dropout": 0.1, "crop": 0.25},
    "sr_high": {"lr": 1.0e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0, "batch": 512, "iterations": 1_000_000,
                "schedule": "linear", "steps": 15, "sampler": "ddim", "blocks": 2, "multiples": [1, 1, 2, 2, 4, 4],
                "attention": [], "dropout": 0.0, "crop": 0.25},
}  # fmt: skip


def facts(config: Config, stage: str) -> dict[str, Any]:
    """A row of unCLIP's table, as a page has it."""
    part: Any = build.section(config, stage)
    found: dict[str, Any] = {name: getattr(part.optim, name) for name in ("lr", "beta2", "eps", "weight_decay")}
    found |= {
        "batch": RANKS * part.trainer.batch_size * part.trainer.accumulate,
        "iterations": part.trainer.max_steps,
        "schedule": part.diffusion.schedule,
        "steps": config.cascade.sampling(stage).steps,
    }
    if stage == "prior":
        model = part.model
        return found | {"width": model.width, "depth": model.depth, "heads": model.width // model.head_width}
    found |= {name: getattr(part.unet, name) for name in ("blocks", "multiples", "dropout")}
    found["sampler"] = config.cascade.sampling(stage).sampler
    found["attention"] = [64 // factor for factor in part.unet.attention]
    return found | ({"crop": part.crop / part.size} if stage != "decoder" else {})


@pytest.mark.parametrize("stage", IMAGE)
def test_the_page_paper_is_unclips_table(stage: str) -> None:
    config = load("paper")
    assert facts(config, stage) == UNCLIP[stage]
    part: Any = build.section(config, stage)
    assert part.optim.beta1 == 0.9 and part.trainer.ema_decay == 0.9999 and part.diffusion.steps == 1000


@pytest.mark.parametrize("stage", IMAGE)
@pytest.mark.parametrize("size", REAL)
def test_every_size_learns_as_paper_does(size: str, stage: str) -> None:
    """Smaller pages are narrower and take smaller batches; what steers learning is the same."""
    same = [
        "lr",
        "beta2",
        "eps",
        "weight_decay",
        "iterations",
        "schedule",
        "steps",
        *(["crop"] if "sr" in stage else []),
    ]
    found = facts(load(size), stage)
    assert {name: found[name] for name in same} == {name: UNCLIP[stage][name] for name in same}


@pytest.mark.parametrize("size", REAL)
def test_what_is_learnt(size: str) -> None:
    """P predicts the embedding, all others noise, with the hybrid loss; the tenth without condition is for guidance."""
    config = load(size)
    assert config.prior.diffusion.prediction == "x0" and config.cascade.candidates == 2
    for stage in ("decoder", "sr_low", "sr_high"):
        part: Any = build.section(config, stage)
        assert (part.diffusion.prediction, part.diffusion.vlb_weight) == ("eps", 0.001)
        assert part.unet.learned_variance
        assert load(size, [f"{stage}.unet.learned_variance=false"])  # one switch away
    with torch.device("meta"):
        for stage in ("prior", "decoder", "decoder_video", "interpolation"):
            assert build.module(config, stage, build.network(config, stage), clip=object()).drop == 0.1  # type: ignore
    for stage in VIDEO:
        assert build.section(config, stage).trainer.ema_decay == 0.9999


@pytest.mark.parametrize("size", REAL)
def test_super_resolution_has_no_condition_but_the_small_picture(size: str) -> None:
    config = load(size)
    degradations = {"sr_low": "blur", "sr_low_video": "blur", "sr_high": "bsr", "sr_high_video": "bsr"}
    for stage, degradation in degradations.items():
        recipe = build.STAGES[stage]
        with torch.device("meta"):
            net = build.network(config, stage)
            module = build.module(config, stage, net, clip=None)
        assert isinstance(net, UNet) and isinstance(module, SuperResolutionModule) and not recipe.needs_clip
        assert net.config.low_res and not net.config.embedding_width and not net.config.attention
        assert net.temporal == (stage == "sr_low_video")  # SR_h works on each frame alone
        assert (module.degradation, module.blur, module.max_noise_level) == (degradation, 0.6, 250)
    for sampling in (config.cascade.sr_low, config.cascade.sr_high):
        assert sampling.guidance == 1 and 0 < sampling.noise_level < 250


@pytest.mark.parametrize("size", REAL)
def test_video_stages(size: str) -> None:
    """16 frames, of which the first gives the embedding; all layers train, no picture is shown, SR_h goes on."""
    config = load(size)
    for stage, earlier in zip(VIDEO, ["decoder", "sr_low", "sr_high", "decoder_video"], strict=True):
        part: Any = build.section(config, stage)
        assert build.STAGES[stage].grows_from == earlier
        assert not part.freeze_spatial and part.image_share == 0
        assert stage == "sr_high_video" or part.frames == 16
    assert config.decoder_video.clip_frame == config.interpolation.clip_frame == "first"
    assert load(size, ["decoder_video.clip_frame=mean"]).interpolation.clip_frame == "mean"  # y_e is that of D^t
    assert set(VIDEO) <= set(build.wanted(config))


@pytest.mark.parametrize("size", REAL)
def test_rates(size: str) -> None:
    """The decoder's go from high to low in the course of its training; later stages meet 5 f, so theirs are even."""
    config = load(size)
    decoder = config.decoder_video
    assert decoder.curriculum.steps == decoder.trainer.max_steps
    means = [decoder.curriculum.mean(share * decoder.trainer.max_steps // 4) for share in range(5)]
    assert means[0] == pytest.approx(24.2) and means[-1] == pytest.approx(6.8) and means == sorted(means, reverse=True)
    assert config.cascade.fps * config.cascade.skip == 30 == decoder.curriculum.f_max
    for part in (config.sr_low_video, config.interpolation):
        even = part.curriculum
        assert (even.k * even.m0, even.k * (1 - even.m0), even.m0) == (1, 1, even.m1)  # Beta(1, 1)
        assert (even.f_min, even.f_max) == (1, 30)


def test_masks_of_the_paper() -> None:
    """Every skip that 16 frames hold whole, five among them, and none of them all."""
    torch.manual_seed(0)
    seen = {tuple(mask.nonzero().flatten().tolist()) for mask in random_masks(500, 16)}
    assert {tuple(range(0, 16, skip)) for skip in (3, 5, 15)} | {(0,), (15,), ()} <= seen
    assert tuple(range(16)) not in seen


# --- what a stage is given ---------------------------------------------------------------------------------------


def test_what_a_stage_reads() -> None:
    config = load("tiny")
    assert set(build.datamodule(config, "prior").preview(1)) == {"image", "text", "key"}
    for stage in ("sr_low", "sr_high"):
        shape = build.super_resolution(config, stage)
        assert build.datamodule(config, stage).preview(1)["image"].shape == (1, 3, shape.crop, shape.crop)
    for stage in VIDEO:
        config = load("tiny", [f"{stage}.frames=3"])
        batch = build.datamodule(config, stage).preview(1)
        side = build.super_resolution(config, stage).crop if "sr" in stage else config.decoder.size
        assert set(batch) == {"video", "fps", "key"} and batch["video"].shape == (1, 3, 3, side, side)


def test_a_stage_may_have_clips_of_its_own(tmp_path: Path) -> None:
    """SR_l^t learns from two sets of clips, the others from one."""
    demo = Path(load("tiny").data.clips)
    for name in ("web", "hd"):
        (tmp_path / name).mkdir()
    for i, clip in enumerate(sorted(demo.rglob("*.mp4"))[:5]):
        shutil.copy(clip, tmp_path / ("web" if i < 3 else "hd"))
    sets = f"[{tmp_path}/web,{tmp_path}/hd]"
    config = load("tiny", [f"data.clips={tmp_path}/web", f"sr_low_video.clips={sets}"])
    found = {stage: build.datamodule(config, stage).preview_source() for stage in VIDEO}
    lengths = {stage: len(source) for stage, source in found.items() if isinstance(source, Clips)}
    assert lengths == {"decoder_video": 3, "sr_low_video": 5, "sr_high_video": 3, "interpolation": 3}


# --- how a stage begins ------------------------------------------------------------------------------------------


def grown(seed: int = 0) -> tuple[Config, UNet, UNet, UNet]:
    """Narrow D with random weights, the D^t that grows from it, and upF that grows from a D^t that has moved."""
    torch.manual_seed(seed)
    shape = ["decoder.unet.width=8", "decoder.unet.head_width=8", "decoder.unet.learned_variance=true"]
    config = load("tiny", [*shape, "clip.model.embedding_width=16"])
    d, dt, up = (build.network(config, stage) for stage in ("decoder", "decoder_video", "interpolation"))
    assert isinstance(d, UNet) and isinstance(dt, UNet) and isinstance(up, UNet)
    with torch.no_grad():
        for p in d.parameters():
            p.copy_(torch.randn_like(p) / max(1.0, p[0].numel() ** 0.5) if p.ndim > 1 else torch.randn_like(p) / 3)
    dt.load_image_weights(d.state_dict())
    moved = {k: v + 0.02 * torch.randn_like(v) for k, v in dt.state_dict().items()}
    up.load_image_weights(moved)
    return config, d, dt, up


def still(frames: int = 4) -> dict[str, torch.Tensor]:
    """Two clips in which nothing moves, with the embedding of each."""
    picture = torch.randint(256, (2, 3, 1, 32, 32), dtype=torch.uint8)
    embedding = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    return {
        "video": picture.expand(-1, -1, frames, -1, -1),
        "fps": torch.tensor([4.0, 9.0]),
        "image_embedding": embedding,
    }


def test_the_first_loss_of_dt_is_that_of_d() -> None:
    """On a clip in which nothing moves, as on every other: D's loss of its frames, under the same noise."""
    config, d, dt, _ = grown()
    seen: list[Any] = []
    dt.register_forward_hook(lambda net, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    module, batch = build.module(config, "decoder_video", dt, clip=object()), still()  # type: ignore[arg-type]
    assert isinstance(module, DecoderModule)
    loss = module.loss(batch)
    ((z, t), given) = seen[0]
    x0, process = batch["video"] / 127.5 - 1, build.diffusion(config, "decoder")
    alpha, sigma = process.at(t, x0)
    eps, frames = (z - alpha * x0) / sigma, z.shape[2]

    def folded(value: torch.Tensor) -> torch.Tensor:
        return rearrange(value, "b c f h w -> (b f) c h w") if value.ndim == 5 else value.repeat_interleave(frames, 0)

    condition = {name: folded(given[name]) for name in ("embedding", "drop")}
    assert torch.equal(given["embedding"], scaled(batch["image_embedding"]))
    output = d(folded(z), folded(t), **condition)
    expected = process.loss(output, *(folded(v) for v in (x0, z, t, eps))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.item() > 0.1


def test_upf_begins_as_dt_whatever_is_given() -> None:
    config, _, _, up = grown()
    trained = build.network(config, "decoder_video")
    assert isinstance(trained, UNet)
    trained.load_state_dict({k: v for k, v in up.state_dict().items() if k != "conv_given.weight"})
    z, t, given = torch.randn(1, 3, 4, 32, 32), torch.tensor([300]), torch.randn(1, 4, 4, 32, 32)
    shared: dict[str, Any] = {"embedding": torch.randn(1, 16), "fps": torch.tensor([7.0])}
    with torch.no_grad():
        assert torch.equal(up(z, t, given=given, **shared), trained(z, t, **shared))
        assert not torch.allclose(trained(z, t, **shared)[:, :, :1], trained(z[:, :, :1], t, **shared))  # time is heard
    assert up.conv_given is not None and up.conv_given.weight.shape[1] == 4  # masked RGB and mask


def test_the_commands_begin_where_the_earlier_stage_ended(trained: Config) -> None:
    """The tiny page holds spatial layers still, so after training they are the image checkpoint's to the bit."""
    image = build.weights(trained, "decoder")
    for stage in ("decoder_video", "interpolation"):
        grown = build.weights(trained, stage)
        assert all(torch.equal(grown[key], value) for key, value in image.items())
        assert grown["fps.2.weight"].any()  # and it has trained
    assert build.weights(trained, "interpolation")["conv_given.weight"].any()
    ends, begins = (build.summary(trained, stage) for stage in ("decoder_video", "interpolation"))
    assert ends and begins and begins["first_loss"] == pytest.approx(ends["last_loss"], rel=1e-5)


# --- joint training ----------------------------------------------------------------------------------------------


def joint(config: Config, stage: str, share: float = 0.5) -> Config:
    return replace(config, **{stage: replace(getattr(config, stage), image_share=share, freeze_spatial=False)})


@pytest.mark.parametrize("stage", VIDEO)
def test_pictures_teach_what_is_spatial_alone(fresh: Config, stage: str) -> None:
    config = joint(fresh, stage)
    net = build.network(config, stage)
    assert isinstance(net, UNet)
    module = build.module(config, stage, net, build.Clip(build.build_clip(config.clip.model), "x"))
    batches = iter(build.datamodule(config, stage).train_dataloader())
    batch = next(batch for batch in batches if "image" in batch)
    part: Any = build.section(config, stage)
    assert (
        set(batch) == {"image", "key", "seed", "skipped"}
        and len(batch["image"]) == part.frames * part.trainer.batch_size
    )
    assert isinstance(module, DecoderModule | SuperResolutionModule)
    with torch.no_grad():
        for p in net.parameters():  # nothing at zero, so that every layer that is passed has a gradient
            p.copy_(torch.randn_like(p) / 10)
    module.loss(batch).backward()
    with_gradient = {key for key, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert not with_gradient & net.temporal_keys()
    assert set(dict(net.named_parameters())) - net.temporal_keys() - with_gradient <= {"no_embedding"}
    assert isinstance(module, InterpolationModule) == (stage == "interpolation")


def test_joint_training_resumes_exactly_and_logs(fresh: Config, trained: Config) -> None:
    """Two steps, then four more from the checkpoint: weights and losses of six steps at once, bit for bit."""
    config = joint(fresh, "decoder_video")
    whole = replace(config, runs=config.runs + "_whole")
    for run in (config, whole):
        for needed in ("clip", "decoder"):
            source = build.run_folder(trained, needed)
            shutil.copytree(source, build.run_folder(run, needed), ignore=shutil.ignore_patterns("wandb*"))
        steps = (2, 6) if run is config else (6,)
        for n in steps:
            part = run.decoder_video
            constant = replace(part.optim, schedule="constant")
            run = replace(run, decoder_video=replace(part, optim=constant, trainer=replace(part.trainer, max_steps=n)))
            train(run, "decoder_video")
    one, two = (build.weights(c, "decoder_video") for c in (config, whole))
    assert all(torch.equal(one[key], two[key]) for key in two)
    logs = [(build.run_folder(c, "decoder_video") / "metrics.csv").read_text() for c in (config, whole)]
    assert logs[0] == logs[1]
    state = torch.load(build.run_folder(whole, "decoder_video") / "checkpoints" / "last.ckpt", weights_only=True)
    counts = state["VideoDataModule"]
    assert counts["consumed"] > 0 and counts["pictures"] > 0
    pictures = 2 * whole.decoder_video.frames  # of a batch, in place of 2 clips
    assert counts["consumed"] / 2 + counts["pictures"] / pictures == 6


def test_joint_training_and_what_it_rules_out() -> None:
    config = load("tiny", ["decoder_video.image_share=0.3"])
    with torch.device("meta"), pytest.raises(ValueError, match="image_share=0 or freeze_spatial=false"):
        build.module(config, "decoder_video", build.network(config, "decoder_video"), clip=object())  # type: ignore
    with pytest.raises(ValueError, match="data.shards"):
        build.datamodule(load("base", ["data.clips=x", "decoder_video.image_share=0.3"]), "decoder_video")
    for override, name in (("devices=1", "auto"), ("devices=2", "ddp_find_unused_parameters_true")):
        assert (
            build.strategy(load("tiny", [f"trainer.{override}", "image_share=0.1"], "decoder_video").decoder_video)
            == name
        )
    assert build.strategy(load("tiny", ["trainer.devices=2"], "decoder_video").decoder_video) == "auto"
