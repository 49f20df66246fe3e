"""Configs: every shipped page builds, and mistakes are answered with a sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from experiments import build
from experiments.config import Config, load, save, sizes
from models.sampling import PRESETS, STAGES
from models.unet import UNet

PAPER = {"prior": 1.3, "decoder_video": 3.1, "interpolation": 3.1, "sr_low_video": 1.4, "sr_high": 0.7}


@pytest.mark.parametrize("size", sizes())
def test_every_page_builds_its_modules(size: str) -> None:
    config = load(size)
    with torch.device("meta"):
        for stage in build.wanted(config):
            net = build.network(config, stage)
            assert build.module(config, stage, net, clip=object() if build.STAGES[stage].needs_clip else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", sizes())
def test_sides_fit_between_stages(size: str) -> None:
    config = load(size)
    assert config.decoder.size * config.sr_low.factor == config.sr_low.size
    assert config.sr_low.size * config.sr_high.factor == config.sr_high.size
    for stage in (config.sr_low, config.sr_high):
        levels = stage.unet.patch * 2 ** (len(stage.unet.multiples) - 1)
        assert stage.crop % levels == 0 and stage.size % levels == 0 and stage.crop % stage.factor == 0


@pytest.mark.parametrize("size", sizes())
def test_video_stages_add_exactly_the_temporal_keys(size: str) -> None:
    config = load(size)
    with torch.device("meta"):
        for stage, recipe in build.STAGES.items():
            if not recipe.grows_from:
                continue
            grown, earlier = build.network(config, stage), build.network(config, recipe.grows_from)
            assert isinstance(grown, UNet)
            new = set(grown.state_dict()) - set(earlier.state_dict())
            assert new <= grown.temporal_keys()
            assert set(earlier.state_dict()) <= set(grown.state_dict())


def test_paper_has_the_papers_size() -> None:
    config, total = load("paper"), 0.0
    with torch.device("meta"):
        for stage, billions in PAPER.items():
            count = sum(p.numel() for p in build.network(config, stage).parameters()) / 1e9
            assert count == pytest.approx(billions, rel=0.05), stage
            total += count
    assert total == pytest.approx(9.6, rel=0.03)


def test_the_readmes_table_of_parameters_is_counted() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    start = next(i for i, row in enumerate(table) if row[0] == "parameters")
    columns = table[start][1:]
    assert sorted(columns) == sizes()
    rows = {row[0]: row[1:] for row in table[start + 2 : start + 9]}
    stages = {"P": "prior", "D^t": "decoder_video", "upF": "interpolation", "SR_l^t": "sr_low_video", "SR_h": "sr_high"}
    for i, size in enumerate(columns):
        config = load(size)
        with torch.device("meta"):
            counts = {
                name: sum(p.numel() for p in build.network(config, stage).parameters())
                for name, stage in stages.items()
            }
        for name, count in {**counts, "five networks": sum(counts.values())}.items():
            number, unit = rows[name][i].split()
            last_digit = 10.0 ** -len(number.partition(".")[2])
            assert abs(count / {"M": 1e6, "B": 1e9}[unit] - float(number)) <= 0.51 * last_digit, (name, size)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("decoder.unet.widht=3", "decoder.unet.width"),
        ("unet.widht=3", "decoder.unet.width"),
        ("trainer.max_step=3", "decoder.trainer.max_steps"),
        ("max_steps=3", "decoder.trainer.max_steps"),
        ("decodr.size=3", "'decoder'"),
        ("trainer.max_steps=many", "decoder.trainer.max_steps"),
        ("trainer.max_steps", "key=value"),
        ("cascade.decoder.step=3", "cascade.decoder.steps"),
    ],
)
def test_mistakes_name_the_nearest_key(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        load("tiny", [override], section="decoder")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_reach_the_stage_and_the_top() -> None:
    config = load("tiny", ["trainer.max_steps=7", "seed=3", "prior.depth=1".replace("prior", "prior.model")], "decoder")
    assert (config.decoder.trainer.max_steps, config.seed, config.prior.model.depth) == (7, 3, 1)
    assert config.sr_low.trainer.max_steps != 7


def test_a_page_of_ones_own(tmp_path: Path) -> None:
    page = tmp_path / "mine.yaml"
    page.write_text("extends: tiny\ndecoder: {trainer: {max_steps: 5}}\n")
    config = load(str(page))
    assert config.decoder.trainer.max_steps == 5 and config.size == "mine"
    assert config.decoder.unet == load("tiny").decoder.unet
    page.write_text("extends: tiny\ndecoder: {trainr: {max_steps: 5}}\n")
    with pytest.raises(
        ValueError, match=r"mine.yaml: there is no key 'decoder.trainr'; did you mean 'decoder.trainer'"
    ):
        load(str(page))


def test_there_is_no_such_page() -> None:
    with pytest.raises(FileNotFoundError, match="tiny"):
        load("enormous")


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    config = load("tiny")
    save(config, tmp_path / "saved.yaml")
    assert "${" not in (tmp_path / "saved.yaml").read_text()
    assert replace(load(str(tmp_path / "saved.yaml")), size="tiny", page="tiny") == config
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["decoder"]["size"] == config.decoder.size


def test_video_stages_have_no_place_for_text() -> None:
    config = load("tiny")
    for stage in ("decoder_video", "sr_low_video", "sr_high_video", "interpolation"):
        data = build.datamodule(config, stage)
        batch = data.preview(1)
        assert set(batch) == {"video", "fps", "key"}
    assert set(build.datamodule(config, "prior").preview(1)) == {"image", "text", "key"}


def test_sr_high_goes_on_with_video_unless_switched_off() -> None:
    assert "sr_high_video" in build.wanted(load("tiny"))
    assert "sr_high_video" not in build.wanted(load("tiny", ["sr_high.finetune_on_video=false"]))


def test_missing_data_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build.datamodule(load("tiny", [f"data.shards=[{tmp_path}/nowhere.tar]"]), "decoder").preview(1)
    with pytest.raises(ValueError, match="data.shards"):
        build.datamodule(load("base"), "decoder")
    with pytest.raises(ValueError, match="data.clips"):
        build.datamodule(load("base"), "decoder_video")
    assert isinstance(load("tiny"), Config)


def test_keys_of_metadata_are_free_and_those_of_the_page_are_not(tmp_path: Path) -> None:
    config = load("tiny", ["data.filters.only.group=[animals]", "data.filters.without.hexcode=held_out.txt"])
    assert config.data.filters.only == {"group": ["animals"]}
    assert config.data.filters.without == {"hexcode": "held_out.txt"}
    with pytest.raises(ValueError, match="data.filters.only"):
        load("tiny", ["data.filters.onyl.group=[animals]"])


def test_a_stage_has_pictures_of_its_own() -> None:
    config = load("tiny", ["sr_high.shards=[large.tar]", "data.weights=[1]"])
    assert build.datamodule(config, "sr_high").groups == [["large.tar"]]  # type: ignore[union-attr]
    assert build.datamodule(config, "sr_low").groups == [config.data.shards]  # type: ignore[union-attr]


@pytest.mark.parametrize("size", sizes())
def test_a_preset_on_the_command_line_wins_over_the_page(size: str, tmp_path: Path) -> None:
    """Over any stage's sampler and steps there, not over those that the command line names too."""
    page = tmp_path / "mine.yaml"
    page.write_text(f"extends: {size}\ncascade: {{decoder: {{sampler: ddim, steps: 77}}, sr_low: {{steps: 3}}}}\n")
    for where in (size, str(page)):
        own, draft = load(where), load(where, ["cascade.sr_high.steps=9", "cascade.preset=draft"], "generate")
        for stage in STAGES:
            found, before = draft.cascade.sampling(stage), own.cascade.sampling(stage)
            sampler, steps, bend = PRESETS["draft"][stage]
            assert (found.sampler, found.steps, found.bend) == (sampler, 9 if stage == "sr_high" else steps, bend)
            assert (found.guidance, found.noise_level) == (before.guidance, before.noise_level)
