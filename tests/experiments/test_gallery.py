"""The gallery: one page of films beside real clips that a real browser plays."""

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from experiments.config import load
from experiments.gallery import MOST, gallery, main, real_clips
from experiments.samples import playable, samples

CODED = {"libx264": "yuv420p", "libx264rgb": "rgb24", "mpeg4": "yuv420p"}


def film(path: Path, codec: str = "libx264", prompt: str = "", side: int = 48) -> None:
    """Three frames of noise; a clip kept for scores is libx264rgb, which browsers do not play."""
    path.parent.mkdir(exist_ok=True, parents=True)
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        file.metadata["comment"] = json.dumps({"prompt": prompt}) if prompt else "shot on a walk"
        video = file.add_stream(codec, rate=12)
        video.width = video.height = side
        video.pix_fmt = CODED[codec]
        for _ in range(3):
            picture = noise.integers(0, 255, (side, side, 3), np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(video.encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder of a size with clips kept for scores, and two scores."""
    folder = tmp_path / "tiny" / "evaluate" / "samples"
    prompts = ["a 3D emoji of octopus", "a 3D emoji of </script>", "a 3D emoji of tiger"]
    for k in range(3):
        film(folder / f"{k:06d}.mp4", "libx264rgb")
    (folder / "manifest.json").write_text(json.dumps({"made_of": {}, "prompts": prompts}))
    of = {"n": 3, "folder": str(folder)}
    fvd = {"value": 123.4, "interval": [110.0, 140.0], "weights": "random", "resize": "bilinear"}
    (folder.parent / "fvd.json").write_text(
        json.dumps({"scores": {"fvd_random": fvd}, "samples": of, "notes": ["few"]})
    )
    clipsim = {"scores": {"clipsim": {"value": 0.25, "backbone": "ViT-B-32/openai"}}, "samples": of}
    (folder.parent / "clipsim.json").write_text(json.dumps(clipsim))
    other = {"scores": {"is_random": {"value": 7.0}}, "samples": {"folder": "elsewhere"}}
    (folder.parent / "is.json").write_text(json.dumps(other))
    return tmp_path / "tiny"


def test_a_browser_plays_it(run: Path, browser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tiny", f"runs={run.parent}"])
    page = Path(capsys.readouterr().out.strip())
    assert page == run / "evaluate" / "samples" / "gallery.html"
    text = page.read_text()
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", text) and text.count("</script>") == 1
    assert not [s for s in re.findall(r'src="([^"]{5})', text) if s != "data:"]
    browser.open(f"file://{page}")
    cards = browser.js("[...document.querySelectorAll('.pair')].map((p) => [p.querySelector('figcaption').innerText,"
                       "[...p.querySelectorAll('span')].map((s) => s.innerText).join()])")  # fmt: skip
    assert cards == [["a 3D emoji of octopus", "made,real"], ["a 3D emoji of </script>", "made"],
                     ["a 3D emoji of tiger", "made,real"]]  # fmt: skip
    browser.wait("[...document.querySelectorAll('video')].every((v) => v.readyState > 1 && v.duration > 0.2)")
    browser.wait("document.querySelector('video').played.length > 0")
    sizes = browser.js("[...document.querySelectorAll('video')].map((v) => v.videoWidth)")
    assert sizes == [48, 256, 48, 48, 256]
    shown = browser.js("document.body.innerText")
    for word in (
        "3 of 3 films in samples, 2 beside",
        "123.40\nfvd_random, 110.00 to 140.00",
        "0.2500\nclipsim, ViT-B-32/openai",
    ):
        assert word in shown, word
    assert "is_random" not in text and "resize bilinear, n 3; few" in text  # scores of these films alone
    assert all(address.startswith(("file:///", "data:", "about:")) for address in browser.asked())


def test_sentences_come_from_manifest_metadata_and_name(tmp_path: Path) -> None:
    film(tmp_path / "000001.mp4")
    film(tmp_path / "film-3.mp4", prompt="日本の猫")
    film(tmp_path / "a-cat-s-tail-12.mp4")
    film(tmp_path / "a-dog-12.mp4")
    (tmp_path / "manifest.json").write_text(json.dumps({"prompts": ["A bird", "A fish"]}))
    found = samples(tmp_path, ["A cat's tail"])
    assert [f.prompt for f in found] == ["A fish", "A cat's tail", "a dog", "日本の猫"]
    assert samples(tmp_path, ["A dog", "猫", "A dog"])[2].prompt == "A dog"
    with pytest.raises(ValueError, match="a-dog-12.mp4 may be of 'A dog!' or of 'A dog\\?'"):
        samples(tmp_path, ["A dog!", "A dog?"])
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        samples(tmp_path, [])


def test_what_browsers_play(tmp_path: Path) -> None:
    """A film that they play keeps its pictures to the bit; others become h264; large ones become small."""
    for codec in CODED:
        film(tmp_path / f"{codec}.mp4", codec, "secret")
    for film_ in samples(tmp_path, []):
        assert film_.plays == (film_.path.stem == "libx264")
        for side, wide in ((0, 48), (64, 48), (32, 32)):
            data, kind = playable(film_, side)
            copy = tmp_path / "copy" / "copy.mp4"
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(data)
            (made,) = samples(copy.parent, [])
            assert kind == "mp4" and made.plays and made.size == (wide, wide) and b"secret" not in data
            assert b"x264" not in data
            with av.open(str(copy)) as one, av.open(str(film_.path)) as other:
                pictures = [[f.to_ndarray(format="rgb24") for f in file.decode(video=0)] for file in (one, other)]
            assert len(pictures[0]) == 3 and (side == 32 or film_.plays == np.array_equal(*pictures))


def test_real_clips_are_those_that_the_evaluation_noted(run: Path, tmp_path: Path) -> None:
    folder, real = run / "evaluate" / "samples", tmp_path / "real"
    film(real / "video7010.mp4")
    (folder / "real.json").write_text(
        json.dumps({"a 3D emoji of tiger": str(real / "video7010.mp4"), "a 3D emoji of octopus": "gone.mp4"})
    )
    text = gallery(folder, load("tiny", [f"runs={run.parent}"])).read_text()
    assert "1 beside a real clip" in text and text.count("<span>real</span>") == 1
    (folder / "real.json").unlink()
    (real / "clips.csv").write_text("videoid,page_dir,name\nvideo7010,,tiger\n")
    elsewhere = load("tiny", [f"runs={run.parent}", f"evaluate.clips={real}"])
    assert real_clips(elsewhere) == {"a 3D emoji of tiger": str(real / "video7010.mp4")}


def test_of_a_long_clip_the_beginning_is_shown(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", "mpeg4")
    (long,) = samples(tmp_path, [])
    (tmp_path / "b.mp4").write_bytes(playable(long, 32, seconds=2 / 12)[0])
    assert samples(tmp_path, [])[1].seconds == pytest.approx(2 / 12, abs=0.01)


def test_a_large_folder_and_bad_input(run: Path, tmp_path: Path) -> None:
    config = load("tiny", [f"runs={run.parent}"])
    assert len(real_clips(config)) == 96
    film(tmp_path / "many" / "a-1.mp4")
    for k in range(2, 60):
        (tmp_path / "many" / f"a-{k}.mp4").write_bytes((tmp_path / "many" / "a-1.mp4").read_bytes())
    text = gallery(tmp_path / "many", config).read_text()
    assert text.count("<figure") == MOST and f"{MOST} of 59 films" in text
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a-1.mp4").write_bytes(b"no film")
    for folder, sentence in (("empty", "holds no films"), ("none", "there is no folder"), ("broken", "cannot be read")):
        with pytest.raises(SystemExit, match=sentence):
            main(["tiny", str(tmp_path / folder), f"runs={run.parent}"])
