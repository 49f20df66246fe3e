"""The whole cascade, from shards and clips to a film: run folders, resume, and errors for people."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import build, demo
from experiments.config import Config, save
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.train import train
from lightning_modules.wandb_logger import history

ROOT = Path(__file__).parents[2]
NO_WANDB = shutil.ignore_patterns("wandb*")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the commands as a user does."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def with_steps(config: Config, stage: str, steps: int) -> Config:
    """The config with another number of steps for a stage."""
    part = getattr(config, stage)
    return replace(config, **{stage: replace(part, trainer=replace(part.trainer, max_steps=steps))})


def test_every_stage_leaves_a_run_folder(trained: Config) -> None:
    for stage in build.wanted(trained):
        run = build.run_folder(trained, stage)
        assert (run / "config.yaml").is_file() and (run / "checkpoints" / "last.ckpt").exists()
        with (run / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
        assert steps == [0, 1, 2, 3]
        assert list(run.glob("wandb/offline-run-*/*.wandb"))
        result = build.summary(trained, stage)
        assert result is not None and result["steps"] == 4 and result["parameters"] > 0
        if stage not in ("clip", "prior"):
            picture = run / "samples" / "step_00000004.png"
            assert Image.open(picture).width > 8
            assert stage in ("decoder", "sr_low", "sr_high", "sr_high_video") or picture.with_suffix(".mp4").is_file()


def test_wandb_run_holds_losses_and_pictures(trained: Config) -> None:
    run = build.run_folder(trained, "decoder_video")
    (record,) = run.glob("wandb/offline-run-*/*.wandb")  # protobuf records, in which keys stand as they are
    for key in (b"loss", b"probe", b"trainer/global_step", b"samples", b"clips"):
        assert key in record.read_bytes(), key
    assert list(run.glob("wandb/offline-run-*/files/media/videos/decoder_video/*.mp4"))
    assert list(run.glob("wandb/offline-run-*/files/media/images/decoder_video/*.png"))


def test_checkpoints_hold_plain_types_and_no_clip(trained: Config) -> None:
    for stage in ("prior", "decoder", "decoder_video", "interpolation"):
        path = build.run_folder(trained, stage) / "checkpoints" / "last.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        net = build.network(trained, stage)
        assert {key.removeprefix("net.") for key in state} == set(net.state_dict())


def test_a_film_for_a_sentence(trained: Config) -> None:
    path, sheet = generate(trained, "a 3D emoji of octopus", seed=3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (len(frames), *frames[0].shape) == (76, 64, 64, 3)
        assert float(stream.average_rate or 0) == trained.cascade.fps * trained.cascade.skip
        assert stream.codec_context.name == "h264"
    picture = Image.open(sheet)
    assert picture.width > 1000 and picture.height > 600
    again, _ = generate(replace(trained, runs=trained.runs), "a 3D emoji of octopus", seed=3)
    assert path == again


def test_interrupted_training_goes_on_as_if_it_had_not_been(fresh: Config, trained: Config) -> None:
    """Two steps, then two more from the checkpoint: weights, average and losses of four steps at once, bit for bit."""
    for stage in ("decoder", "decoder_video"):
        for needed in ("clip", "decoder"):
            if needed != stage:
                folder = build.run_folder(fresh, needed)
                shutil.copytree(build.run_folder(trained, needed), folder, dirs_exist_ok=True, ignore=NO_WANDB)
        shutil.rmtree(build.run_folder(fresh, stage), ignore_errors=True)
        stage_config = getattr(fresh, stage)
        constant = replace(stage_config, optim=replace(stage_config.optim, schedule="constant"))
        config = replace(fresh, **{stage: constant})
        whole = replace(config, runs=config.runs + "_whole")
        shutil.copytree(fresh.runs, whole.runs, dirs_exist_ok=True, ignore=NO_WANDB)
        train(with_steps(config, stage, 2), stage)
        train(config, stage)
        train(whole, stage)
        one, two = (torch.load(build.run_folder(c, stage) / "checkpoints/last.ckpt") for c in (config, whole))
        assert all(torch.equal(one["state_dict"][k], two["state_dict"][k]) for k in two["state_dict"])
        average = load_file(build.run_folder(whole, stage) / "weights.safetensors")
        assert all(torch.equal(v, average[k]) for k, v in build.weights(config, stage).items())
        logs = [(build.run_folder(c, stage) / "metrics.csv").read_text() for c in (config, whole)]
        assert logs[0] == logs[1]


def test_demo_killed_and_run_again_goes_on(fresh: Config, tmp_path: Path) -> None:
    """SIGKILL in the middle of a stage; the second run skips what is done and finishes."""
    config = with_steps(fresh, "clip", 400)
    config.clip.trainer.checkpoint_every = 10
    page = tmp_path / "micro.yaml"
    save(replace(config, size="micro"), page)
    own = {k: v for k, v in os.environ.items() if "WANDB_SERVICE" not in k}  # not the W&B process of these tests
    process = subprocess.Popen([sys.executable, "-m", "experiments.train", "clip", str(page)], cwd=ROOT, env=own)
    last = build.run_folder(config, "clip") / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert build.summary(config, "clip") is None
    start = torch.load(last, weights_only=True)["global_step"]
    assert 0 < start < 400
    train(config, "clip")
    result = build.summary(config, "clip")
    assert result is not None and result["steps"] == 400
    rows = list(history(build.run_folder(config, "clip")))  # W&B has one curve of it: each step once, in order
    assert [row["trainer/global_step"] for row in rows] == [row["_step"] for row in rows] == list(range(401))
    with (build.run_folder(config, "clip") / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]] == [
            r["clip/loss"] for r in rows[:400]
        ]


def test_finished_stages_are_skipped(trained: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = {s: (build.run_folder(trained, s) / "weights.safetensors").stat().st_mtime_ns for s in build.STAGES}
    demo.train_all(trained)
    assert capsys.readouterr().out.count("skipped") == len(build.wanted(trained))
    after = {s: (build.run_folder(trained, s) / "weights.safetensors").stat().st_mtime_ns for s in build.STAGES}
    assert before == after
    assert all(recipe.title in demo.table(trained) for recipe in build.STAGES.values())


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("prior", "make train-clip SIZE="),
        ("decoder_video", "make train-clip SIZE="),
        ("sr_low_video", "make train-sr-low SIZE="),
    ],
)
def test_a_missing_earlier_stage_names_its_command(fresh: Config, stage: str, sentence: str) -> None:
    with pytest.raises(FileNotFoundError, match=sentence + r".*micro\.yaml`"):
        train(fresh, stage)


def test_generating_before_training_names_the_command(fresh: Config) -> None:
    with pytest.raises(FileNotFoundError, match="make train-clip SIZE="):
        generate(fresh, "a bear")


def test_evaluation_without_published_weights_has_another_name(trained: Config) -> None:
    result = evaluate(trained, "fvd")
    score = result["scores"]["fvd_random"]
    assert list(result["scores"]) == ["fvd_random"] and score["value"] > 0
    assert (score["n_real"], score["n_fake"]) == (3, 3)
    written = json.loads((build.run_folder(trained, "evaluate") / "fvd.json").read_text())
    assert written == result
    similarity = evaluate(trained, "clipsim")["scores"]["clipsim"]
    assert -1 <= similarity["value"] <= 1 and re.fullmatch("ours-micro-[0-9a-f]{8}", similarity["backbone"])


def test_bad_shards_cost_samples_not_the_run(fresh: Config, tmp_path: Path) -> None:
    """One shard cut in half, one of rubbish: what can be read is trained on, and the loss of data is told."""
    whole = (ROOT / "experiments/demo/pairs/00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00001.tar").write_bytes(b"rubbish" * 1000)
    data = replace(fresh.data, shards=[str(tmp_path / "{00000..00001}.tar")])
    result = train(replace(fresh, data=data), "clip")
    assert result["steps"] == 4 and sum(result["skipped"].values()) >= 2


def test_a_long_caption_and_a_long_prompt(trained: Config) -> None:
    clip = build.load_clip(trained)
    long = "a very " * 100 + "long caption"
    assert clip.encode_text([long]).isfinite().all() and clip.truncated(long)
    with pytest.warns(UserWarning, match="77"):
        generate(trained, long)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["experiments.generate", "tiny", "  "], "the prompt is empty"),
        (["experiments.train", "decodr", "tiny"], "there is no stage 'decodr'"),
        (["experiments.train", "decoder", "huge"], "SIZE is one of"),
        (["experiments.train", "decoder", "tiny", "unet.widht=3"], "did you mean 'decoder.unet.width'"),
        (["experiments.evaluate", "fvd2", "tiny"], "there is no metric 'fvd2'"),
    ],
)
def test_mistakes_on_the_command_line_get_one_sentence(arguments: list[str], sentence: str) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_pretrained_clip_is_loaded_by_path(fresh: Config, tmp_path: Path) -> None:
    """The path of real runs: an architecture known to open_clip, and a checkpoint file with its checksum."""
    (tmp_path / "small-test-clip.json").write_text(
        json.dumps(
            {
                "embed_dim": 24,
                "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(tmp_path / "small-test-clip.json")
    model = open_clip.create_model("small-test-clip")
    path = tmp_path / "clip.pt"
    torch.save(model.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = replace(fresh.clip.model, name="small-test-clip", pretrained=str(path), embedding_width=24, sha256=digest)
    config = replace(fresh, clip=replace(fresh.clip, model=named))
    clip = build.load_clip(config)
    images = torch.randint(0, 255, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.eval().encode_image(clip.preprocess(images))
    assert torch.allclose(clip.encode_image(images), torch.nn.functional.normalize(expected, dim=-1), atol=1e-6)
    assert "clip" not in build.wanted(config)
    assert train(with_steps(config, "prior", 2), "prior")["steps"] == 2

    def broken(**changes: object) -> Config:
        return replace(config, clip=replace(config.clip, model=replace(named, **changes)))  # type: ignore[arg-type]

    for changes, sentence in (
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"embedding_width": 99}, "embeddings of 24"),
        ({"pretrained": ""}, "pretrained is empty"),
        ({"name": "ViT-Z-99", "sha256": ""}, "ViT-Z-99"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build.load_clip(broken(**changes))
    with pytest.raises(FileNotFoundError):
        build.load_clip(broken(pretrained=str(tmp_path / "nowhere.pt")))


def test_the_weights_of_openai_have_their_activation(fresh: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ViT-B-32` alone is GELU, on which open_clip only warns. Nothing is downloaded."""
    made, create = [], open_clip.create_model

    def without_weights(name: str, pretrained: str = "", **settings: object) -> torch.nn.Module:
        assert name == "ViT-B-32"
        with torch.device("meta"):
            made.append(create(name, pretrained=pretrained, load_weights=False, device="meta", **settings))
        return made[-1]

    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "not-read.pt")
    monkeypatch.setattr(open_clip, "create_model", without_weights)
    for tag, activation in (("openai", open_clip.transformer.QuickGELU), ("laion2b_s34b_b79k", torch.nn.GELU)):
        named = replace(fresh.clip.model, name="ViT-B-32", pretrained=tag, embedding_width=512)
        clip = build.load_clip(replace(fresh, clip=replace(fresh.clip, model=named)))
        assert clip.name == f"ViT-B-32/{tag}"
        for tower in (made[-1].visual.transformer, made[-1].transformer):
            assert type(tower.resblocks[0].mlp.gelu) is activation


def test_a_run_folder_of_another_run_is_refused_not_overwritten(trained: Config) -> None:
    folder = build.run_folder(trained, "decoder")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="has trained 4 steps, more than trainer.max_steps=2"):
        train(with_steps(trained, "decoder", 2), "decoder")
    wider = replace(trained, decoder=replace(trained.decoder, unet=replace(trained.decoder.unet, width=32)))
    with pytest.raises(ValueError, match="holds a run of another network"):
        train(wider, "decoder")
    assert (folder / "config.yaml").read_text() == before


def test_training_lowers_the_probe(fresh: Config) -> None:
    """The first loss is of fresh weights and the last of trained ones, on one batch with one noise."""
    result = train(with_steps(fresh, "sr_low", 60), "sr_low")
    assert result["last_loss"] < 0.9 * result["first_loss"]
