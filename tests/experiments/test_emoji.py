"""The model in the box: its files, what its very run could see, and the films that it makes.

The data that it was trained on are not in the repository. The configs that its run left behind are, and are held here
to what they read from files of the same form, and from the data themselves where they are in data/emoji.
"""

import csv
import io
import json
import re
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from datamodules.filters import read_names
from datamodules.tars import opened
from experiments import build, compare, films
from experiments.config import Config, VideoStage, load
from experiments.films import Request
from experiments.generate import make_cascade
from models import uses
from models.cascade import Film

ROOT = Path(__file__).parents[2]
BOX = ROOT / "experiments" / "emoji"
RUNS = sorted(path.parent for path in (BOX / "runs").glob("*/config.yaml"))
CAPTIONED = ("clip", "prior")
EVERY = 1000  # more than there are
TABLE = ["cascade.preset=draft", "cascade.decoder.guidance=3"]  # of the README's command


@pytest.fixture(params=["files of their form", "the data"])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The folder of work has data where the page expects them: the stills and clips of the demo under other names.

    Every other one bears the name of a concept that was held out. Returns the hexcodes of keys that are none.
    """
    opened.cache_clear()  # shards stay open by their paths, which are of other files after a chdir
    if request.param == "the data":
        if not (ROOT / "data" / "emoji" / "clips" / "clips.csv").is_file():
            pytest.skip("data/emoji is empty (experiments/emoji/README.md says where its files are from)")
        monkeypatch.chdir(ROOT)
        concepts = {}
        for path in (ROOT / "data" / "emoji" / "pairs").glob("fluent*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        concepts[Path(member.name).stem] = json.load(tar.extractfile(member)).get("hexcode")  # type: ignore[arg-type]
        return concepts
    demo, folder = ROOT / "experiments" / "demo", tmp_path / "data" / "emoji"
    held_out = sorted(read_names(str(BOX / "held_out_stills.txt")))
    trained = sorted(read_names(str(BOX / "clips.txt")) - read_names(str(BOX / "held_out_clips.txt")))
    names = [name for pair in zip(held_out, trained, strict=False) for name in pair]
    (folder / "pairs").mkdir(parents=True)
    (folder / "clips" / "mp4").mkdir(parents=True)
    with tarfile.open(demo / "pairs" / "00000.tar") as source:
        for target in ("fluent3d-00000", "fluent3d-00001", "fluentsvg768-00000"):
            with tarfile.open(folder / "pairs" / f"{target}.tar", "w") as tar:
                for k, member in enumerate(sorted(source.getmembers(), key=lambda each: each.name)[: 3 * len(names)]):
                    content = source.extractfile(member).read()  # type: ignore[union-attr]
                    hexcode = names[k // 3]  # jpg, json and txt of a sample
                    if member.name.endswith(".json"):
                        content = json.dumps({**json.loads(content), "hexcode": hexcode}).encode()
                    info = tarfile.TarInfo(f"{hexcode}.{member.name.rpartition('.')[2]}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    with (demo / "clips" / "clips.csv").open() as file, (folder / "clips" / "clips.csv").open("w") as out:
        rows = list(csv.DictReader(file))
        table = csv.DictWriter(out, rows[0].keys())
        table.writeheader()
        for row, name in zip(rows, names, strict=False):
            (folder / "clips" / "mp4" / f"{name}.mp4").symlink_to(demo / "clips" / "mp4" / f"{row['videoid']}.mp4")
            table.writerow({**row, "videoid": name})
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return {}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_what_a_stage_of_the_run_has_seen(run: Path, here: dict[str, str]) -> None:
    """Captions with CLIP and P alone; no clip of a held-out concept, nor a still of those that are held out whole."""

    def shown(batch: dict[str, Any]) -> set[str]:
        return {here.get(stem := Path(key).stem, stem) for key in batch["key"]}

    stage, config = run.name, load(str(run / "config.yaml"))
    clips, stills = (read_names(str(BOX / f"held_out_{what}.txt")) for what in ("clips", "stills"))
    batch = build.datamodule(config, stage).preview(EVERY)
    kind = "video" if stage.endswith("video") or stage == "interpolation" else "image"
    wanted = {"key", kind} | ({"text"} if stage in CAPTIONED else {"fps"} if kind == "video" else set())
    assert set(batch) == wanted
    seen = shown(batch)
    known = read_names(str(BOX / ("clips.txt" if kind == "video" else "stills.txt")))
    assert seen and seen <= known and not seen & (clips if kind == "video" else stills)
    free = replace(config.data, clips_without="", filters=replace(config.data.filters, without={}))
    every = shown(build.datamodule(replace(config, data=free), stage).preview(EVERY))
    assert every - seen == every & (clips if kind == "video" else stills) != set()  # the lists alone keep them out
    part = build.section(config, stage)
    if isinstance(part, VideoStage) and part.image_share:  # pictures are shown with the clips
        size = config.decoder.size
        pictures = build.stills(config, part, size, None).preview(EVERY)
        assert set(pictures) == {"key", "image"}
        assert (seen := shown(pictures)) and not seen & stills


def test_the_run_was_whole() -> None:
    """A config, the log and a summary of every stage; the page has not changed since but in how films are sampled."""
    page = load("emoji")
    assert {run.name for run in RUNS} == set(build.wanted(page))
    for run in RUNS:
        config, summary = load(str(run / "config.yaml")), json.loads((run / "summary.json").read_text())
        own = build.section(config, run.name)
        assert summary["steps"] == own.trainer.max_steps and own == build.section(page, run.name)
        filters = replace(config.data.filters, missing="drop")  # what the first stages read lacks no key
        data = replace(config.data, changed=False, filters=filters)
        if run.name not in ("decoder_video", "interpolation"):  # the others were shown all of the groups
            assert not filters.within and data.clips_only == "experiments/emoji/clips.txt"
            within = {"hexcode": "experiments/emoji/concepts.txt"}
            data = replace(data, clips_only=within["hexcode"], filters=replace(filters, within=within))
        assert data == page.data
        assert len((run / "metrics.csv").read_text().splitlines()) > own.trainer.max_steps / own.trainer.log_every / 2


def test_held_out_are_enough() -> None:
    """And they are among the concepts that D^t learns, of most of which it has seen the still."""
    clips, stills, concepts, every = (
        read_names(str(BOX / f"{what}.txt")) for what in ("held_out_clips", "held_out_stills", "concepts", "clips")
    )
    assert len(clips) >= 40 and len(stills) >= 20 and stills <= clips <= concepts and clips <= every


def test_files_of_the_box() -> None:
    """Half precision, none larger than 16 MiB, all at most 80."""
    files = list((BOX / "pretrained").iterdir())
    assert {path.name for path in files} >= {f"{name}.safetensors" for name in build.film_stages(load("emoji"))}
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert sum(path.stat().st_size for path in files) <= 80 * 2**20
    for path in files:
        if path.suffix == ".safetensors":
            kinds = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
            assert kinds == {torch.float16}, path.name


def test_the_page_is_that_of_the_weights(tmp_path: Path) -> None:
    maker = build.cascade(load("emoji", [f"runs={tmp_path}"]))
    assert maker.digest() == json.loads((BOX / "pretrained" / "config.json").read_text())["model"]


def test_the_page_has_the_shapes_of_the_paper() -> None:
    page = load("emoji")
    assert [page.decoder.size, page.sr_low.size, page.sr_high.size] == [64, 256, 768] and page.generate.size_out == 256
    assert (page.cascade.frames, (page.cascade.frames - 1) * page.cascade.skip + 1) == (16, 76)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    runs = tmp_path_factory.mktemp("runs")
    return load("emoji", [f"runs={runs}", "cascade.preset=draft", "cascade.frames=4", "cascade.skip=2"])


@pytest.fixture(scope="module")
def film(config: Config) -> Film:
    """Seven frames of 768 pixels: every network has been at work."""
    maker = make_cascade(config, on_step=lambda *_: None)
    return films.make(config, Request(prompt="a 3D emoji of a rocket", stop="high"), maker)


def check_background(name: str, clip: torch.Tensor, where: torch.Tensor) -> None:
    """Pixels of all frames `b 3 f h w` are white, and stay so, in these places `h w`."""
    background = clip[..., where]
    white = (1 - background).abs().mean() / 2
    moving = (background[:, :, 1:] - background[:, :, :-1]).abs().mean() / 2
    assert white < 0.02 and moving < 0.01, (name, float(white), float(moving))


def test_the_background_is_white_and_still(film: Film) -> None:
    """A border of a sixteenth of the side, where no emoji reaches."""
    for name, clip in film.clips().items():
        side, wide = clip.shape[-1], clip.shape[-1] // 16
        where = torch.ones(side, side, dtype=torch.bool)
        where[wide:-wide, wide:-wide] = False
        check_background(name, clip, where)


def test_a_still_that_is_animated_keeps_its_background(config: Config) -> None:
    """A red ball on white: where the still is white, an eighth of the side away from the ball, so is the film."""
    maker = make_cascade(config, on_step=lambda *_: None)
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    far = ((y - 128) ** 2 + (x - 128) ** 2).sqrt()
    still = torch.full((1, 3, 256, 256), 255, dtype=torch.uint8)
    still[:, 0, far < 80], still[:, 1:, far < 80] = 220, 30
    film = uses.animate(maker, still, [0], "interpolated")
    for name, clip in film.clips().items():
        check_background(name, clip, (far > 112)[2::4, 2::4])


def test_the_first_and_the_last_stage_agree_in_colour(film: Film) -> None:
    """The mean colour of every frame within 2 % of the range; and there is something on the white."""
    assert film.interpolated is not None and film.high is not None
    for later in (film.low, film.high):
        assert later is not None
        first, last = (clip[0].mean(dim=(2, 3)) for clip in (film.interpolated, later))
        assert ((first - last).abs() / 2).max() < 0.02
    assert film.decoded is not None  # the keyframes, beside whose colour is that of all frames of the film
    assert (film.decoded.mean(dim=(0, 2, 3, 4)) - film.high.mean(dim=(0, 2, 3, 4))).abs().max() / 2 < 0.02
    small = F.interpolate(film.high[0].transpose(0, 1), (64, 64), mode="area")
    assert (small - 1).abs().amax(dim=(1, 2, 3)).min() > 0.5
    assert torch.equal(film.interpolated[:, :, ::2], film.decoded)  # type: ignore[arg-type]


def test_the_card_has_the_numbers_of_the_run() -> None:
    card = (BOX / "README.md").read_text()
    assert json.loads((BOX / "pretrained" / "config.json").read_text())["model"] in card
    assert RUNS
    for run in RUNS:
        summary = json.loads((run / "summary.json").read_text())
        loss = f"{summary['first_loss']:.4f} | {summary['last_loss']:.4f}"
        title = re.escape(build.STAGES[run.name].title)
        row = re.search(rf"^\| {title} \|.*$", card, re.MULTILINE)
        assert row and loss in row[0] and f"{summary['steps']:,}" in row[0], run.name


def test_the_table_of_the_readme_is_what_was_measured() -> None:
    """Of the weights that are here, sampled as its command says."""
    result, cascade = json.loads((BOX / "compare.json").read_text()), load("emoji", TABLE).cascade
    assert result["model"] == json.loads((BOX / "pretrained" / "config.json").read_text())["model"]
    assert result["sampling"] == {name: asdict(cascade.sampling(name)) for name in ("prior", "decoder")}
    readme = (ROOT / "README.md").read_text()
    assert compare.markdown(result) in readme
    assert f'make compare SIZE=emoji ARGS="{" ".join(TABLE)} samples=24"' in readme
