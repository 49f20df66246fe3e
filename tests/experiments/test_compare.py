"""The cascade beside its baselines: each kind of clip is what its name says, and each concept in its place."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import build, compare
from experiments.config import Config, load
from experiments.generate import make_cascade
from models.unet import UNet


@pytest.fixture
def listed(trained: Config, tmp_path: Path) -> Config:
    """The trained cascade, as if six clips had been trained on, four held out, and two of their stills too."""
    with (Path(trained.data.clips) / "clips.csv").open() as file:
        keys = [row["videoid"] for row in csv.DictReader(file)][:10]
    for name, some in (("only", keys), ("clips", keys[6:]), ("stills", keys[8:])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{key}  # of the demo\n" for key in some))
    filters = replace(trained.data.filters, without={"hexcode": str(tmp_path / "stills.txt")})
    data = replace(
        trained.data,
        clips_only=str(tmp_path / "only.txt"),
        clips_without=str(tmp_path / "clips.txt"),
        filters=filters,
    )
    return replace(trained, data=data, evaluate=replace(trained.evaluate, samples=4, batch_size=2, workers=0))


def test_concepts_stand_by_what_was_seen_of_them(listed: Config) -> None:
    found = {kind: [clip.key for clip, _ in some] for kind, some in compare.concepts(listed).items()}
    keys = (Path(listed.data.clips_only)).read_text().split("  # of the demo\n")[:-1]
    assert found[compare.TRAINED] == keys[:4]  # the first of six that stand one apart
    assert found[compare.NEVER_MOVED] == keys[6:8] and found[compare.UNSEEN] == keys[8:]
    free = replace(listed, data=replace(listed.data, clips_only="", clips_without=""))
    assert list(compare.concepts(free)) == [compare.TRAINED, compare.NEVER_STILL]  # stills are held out alone
    none = replace(free, data=replace(free.data, filters=replace(free.data.filters, without={})))
    assert list(compare.concepts(none)) == [compare.TRAINED]
    every = compare.concepts(replace(none, evaluate=replace(none.evaluate, samples=0)))
    assert len(every[compare.TRAINED]) == len(compare.named_clips(none))


def test_lists_and_numbers_that_leave_nothing_to_compare(listed: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples=1.*at least two"):
        compare.concepts(replace(listed, evaluate=replace(listed.evaluate, samples=1)))
    (tmp_path / "other.txt").write_text("nothing\n")
    other = replace(listed, data=replace(listed.data, clips_only=str(tmp_path / "other.txt")))
    with pytest.raises(ValueError, match="fewer than two named clips of any kind that .*other.txt lists"):
        compare.concepts(other)


@pytest.mark.parametrize("word", ["clips=elsewhere", "evaluate.output=high"])
def test_settings_that_it_does_not_read_are_refused(word: str) -> None:
    with pytest.raises(SystemExit, match=f"error: '{word}': compare takes D\\^t's clips"):
        compare.main(["tiny", word])


def test_a_clip_that_cannot_be_read_is_told() -> None:
    row = {"clipsim": 0.5, "motion": 1.0, "correlation": 0.0}
    rows = {compare.REAL: {**row, "n": 3}, compare.OURS: {**row, "n": 4, "fvd_random": 1.0}}
    table = compare.markdown({"concepts": {compare.TRAINED: {"n": 4, "rows": rows}}}).splitlines()
    assert table[2] == "| trained on, 4, 3 readable | real clips | 0.500 |  | 1.00 | +0.00 |"
    assert table[3] == "|  | our cascade (D^t) | 0.500 | 1.00 | 1.00 | +0.00 |"
    assert len({line.count("|") for line in table}) == 1


@torch.no_grad()
def test_before_video_frames_are_pictures_and_one_still_is_the_first(listed: Config) -> None:
    maker = make_cascade(listed)
    maker.on_step = None
    kind, began = baseline = compare.without_motion(listed, maker.device)
    assert kind == compare.BEFORE
    trained = maker.decoder
    clips = compare.made(maker, baseline, listed, ["tiger", "octopus"], first=0)
    assert maker.decoder is trained
    before, still = clips[compare.BEFORE], clips[compare.STILL]
    assert clips[compare.OURS].shape == before.shape == still.shape and before.dtype == torch.uint8
    assert torch.equal(still, before[:, :, :1].expand_as(before))
    # The identity in time: other frames leave the first as it is.
    embedding = maker.embed([listed.evaluate.prompt.format("tiger")], [listed.seed])
    x, t = torch.randn(1, 3, 4, 16, 16), torch.tensor([500])
    other = torch.cat((x[:, :, :1], torch.randn(1, 3, 3, 16, 16)), dim=2)
    whole, changed = (began.net(z, t, embedding=embedding, fps=torch.tensor([5.0])) for z in (x, other))
    assert torch.equal(whole[:, :, 0], changed[:, :, 0])


def test_of_a_frozen_decoder_its_pictures_are_in_its_clips_network(listed: Config, tmp_path: Path) -> None:
    """The demo freezes D while time is learnt, so D^t alone says what it began as, where D is not at hand."""
    assert listed.decoder_video.freeze_spatial
    alone = replace(listed, runs=str(tmp_path / "runs"))
    kept = build.run_folder(alone, "decoder_video")
    shutil.copytree(build.run_folder(listed, "decoder_video"), kept)
    (kind, own), (_, of_d) = (compare.without_motion(config, torch.device("cpu")) for config in (alone, listed))
    assert kind == compare.BEFORE
    assert isinstance(own.net, UNet)
    for key in set(own.net.state_dict()) - own.net.temporal_keys():
        torch.testing.assert_close(own.net.state_dict()[key], of_d.net.state_dict()[key], rtol=1e-6, atol=1e-7)
    free = replace(alone, decoder_video=replace(listed.decoder_video, freeze_spatial=False))
    with pytest.raises(FileNotFoundError, match="make train-decoder"):
        compare.without_motion(free, torch.device("cpu"))
    # Spatial layers that went on with pictures are a picture network still, but not the one that training began with.
    joint = replace(free, decoder_video=replace(free.decoder_video, image_share=0.5))
    kind, layers = compare.without_motion(joint, torch.device("cpu"))
    assert kind == compare.IMAGE
    for key in set(own.net.state_dict()) - own.net.temporal_keys():
        assert torch.equal(layers.net.state_dict()[key], own.net.state_dict()[key])


def test_the_command_writes_its_table(listed: Config, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = listed.data
    compare.main([str(page), "samples=2", "batch_size=2", "workers=0", f"data.clips_only={data.clips_only}",
                  f"data.clips_without={data.clips_without}",
                  f"data.filters.without.hexcode={data.filters.without['hexcode']}"])  # fmt: skip
    folder = build.run_folder(load(str(page)), "compare")
    result = json.loads((folder / "compare.json").read_text())
    assert result["sampling"]["decoder"]["guidance"] == load(str(page)).cascade.sampling("decoder").guidance
    assert list(result["concepts"]) == [compare.TRAINED, compare.NEVER_MOVED, compare.UNSEEN]
    for concept in result["concepts"].values():
        rows = concept["rows"]
        assert list(rows) == [compare.REAL, compare.OURS, compare.BEFORE, compare.STILL]
        assert "fvd_random" not in rows[compare.REAL] and all("fvd_random" in rows[kind] for kind in list(rows)[1:])
        assert rows[compare.STILL]["motion"] == 0 and rows[compare.REAL]["motion"] > 0
        assert rows[compare.BEFORE]["correlation"] < 0  # frames that know nothing of each other
    table = (folder / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 3 * 4
