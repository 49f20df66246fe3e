"""The report: one page that holds all it shows, and is drawn by a real browser."""

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from experiments import build
from experiments.charts import curves, linear_ticks, log_ticks, number
from experiments.config import Config
from experiments.report import main, report
from lightning_modules.csv_logger import MetricsCSV

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def page(trained: Config) -> Path:
    return report(Path(trained.runs) / trained.size)


class Parts(HTMLParser):
    """The tags of a page with their attributes; raises where they are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_all_that_it_shows(page: Path, trained: Config) -> None:
    text = page.read_text()
    parts = Parts(text).found
    assert [a["id"] for tag, a in parts if tag == "section"] == build.wanted(trained)
    assert text.count("finished, 4 steps") == 9
    for tag, attributes in parts:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), attributes
    assert "url(" not in text and "@import" not in text
    images = [a["src"] or "" for tag, a in parts if tag == "img"]
    videos = [a["src"] or "" for tag, a in parts if tag == "video"]
    samples = build.run_folder(trained, "decoder") / "samples" / "step_00000004.png"
    assert f"data:image/png;base64,{base64.b64encode(samples.read_bytes()).decode()}" in images
    clip = build.run_folder(trained, "decoder_video") / "prompted" / "step_00000004.mp4"
    assert f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}" in videos
    for told in ("Loss by noise level", "fvd_random, preview", "clipsim, preview", "Learning rate",
                 "waiting", "Clips by frames a second", "samples that the filters left", "a 3D emoji of",
                 "max_steps: 4"):  # fmt: skip
        assert told in text, told
    assert len(text) < 3_000_000


def test_a_single_run_that_has_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsCSV(tmp_path / "decoder" / "metrics.csv")
    for step in range(500):
        log.log_metrics({"loss": 1 / (step + 1), "data/skipped": 3.0, "data/filtered/punsafe": 17.0}, step)
    main([str(tmp_path / "decoder")])
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text()
    assert path.parent == tmp_path / "decoder" and "at step 500" in text and "punsafe</td><td>17" in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there is no run in .*train a stage first"):
        main([str(tmp_path / "empty")])


def test_curves_go_where_the_values_are() -> None:
    drawn = curves("x", {"a": [(0, 1.0), (50, 10.0), (100, 100.0)]}, log=True)
    ((left, low), (middle, half), (right, high)) = [
        tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', drawn)[0].split()
    ]
    assert middle == pytest.approx((left + right) / 2) and half == pytest.approx((low + high) / 2) and high < low
    assert curves("x", {"a": [(0, float("nan"))]}) == "" == curves("x", {"a": [(0, -1.0)]}, log=True)
    assert linear_ticks(0, 0) and linear_ticks(3, 3)[0] < 3 < linear_ticks(3, 3)[-1]
    for low, high in ((0.5, 0.5), (1e-6, 3.0), (0.9, 1.1)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and len(ticks) >= 2
    assert [number(v) for v in (0, 0.0123, 4567, 45678, 1e-6, 2.5e12)] == [
        "0",
        "0.0123",
        "4567",
        "45.7k",
        "1e-6",
        "2.5T",
    ]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(page: Path, tmp_path: Path, scheme: str) -> None:
    """Readable in light and dark: ink of the scheme's colour on its ground, curves and pictures in their colours."""
    shot = tmp_path / "shot.png"
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}",
               f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
               "--window-size=1300,3000", f"--screenshot={shot}", f"file://{page}"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert shot.is_file(), done.stderr
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (1300, 3000)
    ground, ink, curve = {
        "light": ((246, 247, 249), (22, 32, 44), (37, 99, 201)),
        "dark": ((16, 21, 28), (230, 235, 241), (110, 168, 255)),
    }[scheme]
    counts = {colour: n for n, colour in picture.getcolors(maxcolors=1 << 24) or []}
    assert picture.getpixel((5, 5)) == ground
    assert counts.get(ink, 0) > 500 and counts.get(curve, 0) > 500
    assert picture.crop((0, 2000, 1300, 3000)).getcolors(maxcolors=100) is None  # drawn to the bottom, with pictures
