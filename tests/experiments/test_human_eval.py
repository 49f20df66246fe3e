"""People compare films: a page that tells raters nothing, answers clicked in a real browser, and their count."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from experiments import human_eval, human_tally
from experiments.human_eval import HumanEval, build
from experiments.human_tally import tally, wilson
from experiments.samples import PROMPTS, read_prompts, samples

TEXTS = list(read_prompts(PROMPTS))
NAMES = [re.sub("[^a-z0-9]+", "-", TEXTS[i].lower()) for i in (0, 20, 40, 60)]


def film(path: Path, shade: int, side: int = 64) -> None:
    """A film of four frames in a quarter of a second, whose metadata tells who made it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with av.open(str(path), "w") as file:
        file.metadata["comment"] = f"made by {path.parent.name}"
        video = file.add_stream("libx264", rate=16)
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        for i in range(4):
            picture = np.full((side, side, 3), shade, np.uint8)
            picture[:, 10 * i : 10 * i + 9] = 255 - shade
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(video.encode())


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a page that compares two folders of four films."""
    for i, name in enumerate(NAMES):
        film(tmp_path / "ours" / f"{name}-0.mp4", 30 + 9 * i)
        film(tmp_path / "theirs" / f"{name}-0.mp4", 90 + 9 * i)
    build(tmp_path / "ours", tmp_path / "theirs", HumanEval(out=str(tmp_path / "out")))
    return tmp_path / "out"


def answer(out: Path, rater: str, choose: Callable[[int, str], str], pairs: int = 4, saved: str = "2026-01-01") -> Path:
    """A file of answers: `choose` says A or B for (number of a pair, question)."""
    key = json.loads((out / "key.json").read_text())
    rows = []
    for i, (name, pair) in enumerate(list(key["pairs"].items())[:pairs]):
        chosen = {question: pair[choose(i, question)] for question in key["questions"]}
        rows.append({"pair": name, "left": pair["A"], "right": pair["B"], **chosen})
    path = out / "answers" / f"{rater}-{saved}.json"
    path.write_text(json.dumps({"page": key["page"], "rater": rater, "saved": saved, "answers": rows}))
    return path


def test_our_prompts_are_in_the_five_classes() -> None:
    classes = list(read_prompts(PROMPTS).values())
    assert {name: classes.count(name) for name in classes} == {
        "animals": 20, "fantasy": 20, "people": 20, "nature and scenes": 20, "food and beverage": 20
    }  # fmt: skip
    assert PROMPTS.read_text().startswith("Prompts,Category\n")


def test_the_page_tells_raters_nothing(made: Path) -> None:
    """Whatever a rater can read, names, order, bytes and times of files, is the same with the folders exchanged."""
    page, key = made / "page", json.loads((made / "key.json").read_text())
    names = sorted(str(p.relative_to(page)) for p in page.rglob("*") if p.is_file())
    text = (page / "index.html").read_text()
    assert (
        names[-1] == "index.html" and len(names) == 9 and all(re.fullmatch(r"films/\w{16}\.mp4", n) for n in names[:-1])
    )
    everything = text.encode() + b"".join(p.read_bytes() for p in page.rglob("*.mp4"))
    for word in ("ours", "theirs", "made by", "x264", str(made.parent), '"A"', '"B"', "animals"):
        assert word.encode() not in everything, word
    assert not re.search(r"https?://|url\(|@import", text)
    for pair in json.loads(re.findall(r'id="data">(.*)</script>', text)[0])["pairs"]:
        assert pair["films"] == sorted(pair["films"]) and set(pair) == {"id", "prompt", "films"}
    first = [pair["A"] < pair["B"] for pair in key["pairs"].values()]
    build(made.parent / "theirs", made.parent / "ours", HumanEval(out=str(made)))
    assert (page / "index.html").read_text() == text
    assert [p["A"] > p["B"] for p in json.loads((made / "key.json").read_text())["pairs"].values()] == first
    build(made.parent / "ours", made.parent / "theirs", HumanEval(out=str(made), seed=1))
    assert (page / "index.html").read_text() != text


def test_two_kinds_of_files_become_one(made: Path) -> None:
    """A film in VP8 beside one in h264 would tell by its name and its bytes whose it is."""
    theirs = made.parent / "theirs"
    for path in theirs.glob("*.mp4"):
        with av.open(str(path.with_suffix(".webm")), "w") as file, av.open(str(path)) as source:
            video = file.add_stream("libvpx", rate=16)
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
            for frame in source.decode(video=0):
                frame.pts = None
                file.mux(video.encode(frame))
            file.mux(video.encode())
        path.unlink()
    build(made.parent / "ours", theirs, HumanEval(out=str(made)))
    films = list((made / "page" / "films").iterdir())
    assert len(films) == 8 and {film.suffix for film in films} == {".mp4"}
    assert {film.codec for film in samples(made / "page" / "films", {})} == {"h264"}
    assert not any(b"x264" in film.read_bytes() for film in films)


def test_films_meet_by_their_sentence(tmp_path: Path) -> None:
    odd = 'Schrödinger\'s "cat" & </script><b>dog</b>'
    table = tmp_path / "prompts.csv"
    table.write_text('Prompts,Category\n"' + odd.replace('"', '""') + '",Text\nA cat,Animals\n', encoding="utf-8-sig")
    for i, name in enumerate(("schr-dinger-s-cat-script-b-dog-b-0", "a-cat-1", "a-cat-7", "a-dog-3")):
        film(tmp_path / "a" / f"{name}.mp4", 10 * i)
    for i, name in enumerate(("schr-dinger-s-cat-script-b-dog-b-0", "a-cat-5", "a-cat-7", "a-cat", "a-bird-0")):
        film(tmp_path / "b" / f"{name}.mp4", 100 + 10 * i, side=32)
    page, told = build(tmp_path / "a", tmp_path / "b", HumanEval(out=str(tmp_path / "out"), prompts=str(table)))
    found = json.loads((tmp_path / "out" / "key.json").read_text())["pairs"].values()
    assert sorted((p["prompt"], p["class"], *p["names"]) for p in found) == [
        ("A cat", "Animals", "a-cat-1.mp4", "a-cat-5.mp4"),
        ("A cat", "Animals", "a-cat-7.mp4", "a-cat-7.mp4"),
        (odd, "Text", *["schr-dinger-s-cat-script-b-dog-b-0.mp4"] * 2),
    ]
    assert page.read_text().count("</script>") == 2
    assert any("1 of 4 films of A have no partner" in t for t in told) and any("A 64 x 64" in t for t in told)


def test_a_rater_clicks_through(made: Path, browser: Any, tmp_path: Path) -> None:
    """Two raters in Chromium, one of whom stops and comes back; the files they save are counted as they clicked."""
    key = json.loads((made / "key.json").read_text())
    orders = {}
    for rater in ("Ana", "Ben"):
        browser.open(f"file://{made}/page/index.html")
        browser.wait("!!document.querySelector('#rater')")
        browser.click("#rater")
        browser.js("document.querySelector('#rater').select()")
        browser.type(rater)
        browser.click("form button")
        orders[rater] = []
        for i in range(4):
            prompt = browser.js("order[at].prompt")
            assert browser.js("document.querySelector('#count').innerText") == f"{i + 1} of 4"
            assert prompt not in browser.js("document.body.innerText")  # quality is judged without the text
            if i == 0:
                assert browser.js("document.querySelector('#choose-left').disabled")  # not before they are seen
            browser.wait("[films.left, films.right].every((f) => f.videoWidth == 64 && f.duration > 0.2)")
            sides = browser.js("[order[at].left, order[at].right]")
            pair = key["pairs"][browser.js("order[at].id")]
            assert set(sides) == {pair["A"], pair["B"]}
            orders[rater].append((pair["prompt"], sides[0] == pair["A"]))
            browser.click("#choose-left" if sides[0] == pair["A"] else "#choose-right")  # quality: A
            browser.wait(f"document.querySelector('#prompt').innerText.includes({prompt!r})")
            if rater == "Ben" and i == 2:  # closes the page, comes back, turns back, thinks again
                browser.open("about:blank")
                browser.open(f"file://{made}/page/index.html")
                assert browser.js("document.querySelector('#rater').value") == "ben"
                browser.click("form button")
                assert browser.js("[at, step, order[at].left].join()") == f"2,1,{sides[0]}"
                browser.click("#back")
                browser.wait("step == 0")
                browser.click("#choose-left" if sides[0] == pair["B"] else "#choose-right")  # quality: B
                browser.wait("step == 1")
            browser.click("#choose-left" if sides[0] == pair["B"] else "#choose-right")  # faithfulness: B
            browser.wait(f"at == {i + 1}")
        assert "Thank you" in browser.js("document.body.innerText")
        browser.click("#save")
        saved = made.parent / "downloads" / f"answers-{key['page']}-{rater.lower()}.json"
        for _ in range(200):
            if saved.is_file():
                break
            browser.js("new Promise((done) => setTimeout(done, 50))")
        saved.rename(made / "answers" / saved.name)
    assert sorted(p for p, _ in orders["Ana"]) == sorted(p for p, _ in orders["Ben"]) and orders["Ana"] != orders["Ben"]
    result, told = tally(made)
    assert result["raters"] == 2
    assert {k: result["quality"]["all"][k] for k in ("a", "b", "tied")} == {"a": 3, "b": 0, "tied": 1}
    assert {k: result["faithfulness"]["all"][k] for k in ("a", "b", "tied")} == {"a": 0, "b": 4, "tied": 0}
    assert any("quality: 1 of 4 pairs are tied" in t for t in told)
    assert any("faithfulness: 4 of 4 pairs have fewer than five raters" in t for t in told)
    assert all(address.startswith(("file:///", "about:", "blob:")) for address in browser.asked())


def test_the_majority_of_five_counts(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(5):  # pair 0: 3 of 5 for A, pairs 1, 2: all for A, pair 3: all for B
        answer(made, f"r{k}", lambda i, q, k=k: "A" if (i == 0 and k < 3) or i in (1, 2) else "B")
    human_tally.main([str(made)])
    result = json.loads((made / "tally.json").read_text())
    for question in ("quality", "faithfulness"):
        row = result[question]["all"]
        assert (row["a"], row["b"], row["tied"], row["fewer_than_five"], row["unanswered"]) == (3, 1, 0, 0, 0)
        assert row["share_a"] == 0.75 and (row["low"], row["high"]) == wilson(3, 4)
        assert row["agreement"] == pytest.approx((0.6 + 3) / 4)
        assert sum(result[question][name]["pairs"] for name in result[question] if name != "all") == 4
    shown = capsys.readouterr().out
    assert re.search(r"VDM +28 of VDM's page +84\.38% +78\.13%", shown)  # what the paper has
    assert result["published"][0]["faithfulness"] == 78.13 and result["quality"]["all"]["more_than_five"] == 0
    assert "5 raters" in shown and "75.00%" in shown and "30.1% to 95.4%" in shown and "fewer than five" not in shown


def test_of_more_than_five_raters_those_who_saved_first_count(made: Path) -> None:
    for k in range(7):  # by name the last two would come first
        answer(made, f"r{9 - k}", lambda i, q, k=k: "A" if k < 3 else "B", saved=f"2026-01-0{k + 1}")
    answer(made, "r9", lambda i, q: "A", saved="2026-01-09")  # saved again, and still among the first five
    result, told = tally(made)
    row = result["quality"]["all"]
    assert (row["a"], row["b"], row["more_than_five"], row["fewer_than_five"]) == (4, 0, 4, 0)
    assert "quality: 4 of 4 pairs have more than five raters; those who saved first count." in told


def test_what_is_missing_is_told(made: Path) -> None:
    answer(made, "Ana", lambda i, q: "A")
    answer(made, " ana ", lambda i, q: "B", pairs=1, saved="2026-01-02")  # thought again of the first pair
    answer(made, "ben", lambda i, q: "A", pairs=2)
    result, told = tally(made)
    quality = result["quality"]["all"]
    assert result["raters"] == 2 and (quality["a"], quality["b"], quality["tied"]) == (3, 0, 1)
    text = " ".join(told)
    for sentence in ("Rater 'ana' has sent 2 files", "Rater 'ben' has answered 2 of 4 pairs", "1 of 4 pairs are tied",
                     "4 of 4 pairs have fewer than five raters", "chosen in 86% of all answers"):  # fmt: skip
        assert sentence in text, (sentence, told)
    (made / "answers" / "Ana-2026-01-01.json").unlink()
    (made / "answers" / "ben-2026-01-01.json").unlink()
    result, told = tally(made)
    assert result["quality"]["all"]["unanswered"] == 3 and any("3 of 4 pairs have no answer" in t for t in told)


def test_wilson() -> None:
    """The values of the formula for 8 of 10, and of its ends."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6) and wilson(0, 0) == (0, 1)
    assert wilson(10, 10) == pytest.approx((1 - 0.2775328, 1), abs=1e-6)


def test_bad_input_gives_a_sentence(made: Path, tmp_path: Path) -> None:
    ours, out = str(tmp_path / "ours"), f"out={tmp_path / 'new'}"
    empty, broken, alone = (tmp_path / name for name in ("empty", "broken", "alone"))
    for folder in (empty, broken):
        folder.mkdir()
    (broken / f"{NAMES[0]}-0.mp4").write_bytes(b"no film")
    film(alone / "a-word-0.mp4", 50)
    (tmp_path / "bad.csv").write_text("text\nA cat\n")
    for arguments, sentence in (
        ([], "usage"),
        ([ours, ""], "usage"),
        ([ours, str(tmp_path / "none")], "there is no folder"),
        ([ours, str(empty)], "holds no films"),
        ([ours, str(broken)], "cannot be read as a film"),
        ([ours, str(alone)], "no film in .* has the sentence of one in"),
        ([ours, ours], "are the same film"),
        ([ours, ours, "prompts=none.csv"], "no file of prompts none.csv"),
        ([ours, ours, f"prompts={tmp_path / 'bad.csv'}"], "has no column Prompts"),
        ([ours, ours, "sed=1"], "no key 'sed'; did you mean 'seed'"),
        ([ours, ours, "seed=x"], "Value 'x'"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            human_eval.main([*arguments, *([out] if len(arguments) > 1 else [])])
    with pytest.raises(SystemExit, match="there are no answers in"):
        human_tally.main([str(made)])
    with pytest.raises(SystemExit, match="no key.json"):
        human_tally.main([str(tmp_path / "empty")])
    path = answer(made, "ana", lambda i, q: "A")
    with pytest.raises(SystemExit, match="answers to another page"):
        human_eval.main([ours, str(tmp_path / "theirs"), f"out={made}", "seed=3"])
    whole = json.loads(path.read_text())
    for change, sentence in (
        ("{", "not a file of answers"),
        ("[]", "not a file of answers"),
        (json.dumps({**whole, "page": "x"}), "answers another page"),
        (json.dumps({**whole, "answers": [{**whole["answers"][0], "quality": "x"}]}), "has been changed"),
        (json.dumps({**whole, "answers": [{**whole["answers"][0], "pair": "x"}]}), "has been changed"),
    ):
        path.write_text(change)
        with pytest.raises(SystemExit, match=sentence):
            human_tally.main([str(made)])
    assert len(samples(tmp_path / "ours", {})) == 4
