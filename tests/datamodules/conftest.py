"""Small shards and videos, made anew for each test."""

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from lightning import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn, optim

COLORS = ("red", "green", "blue", "white", "black", "orange", "purple", "gray")


def jpeg(index: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLORS[index % len(COLORS)]).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def make_shard() -> Callable[..., Path]:
    """make_shard(path, n, first=0, size=(48, 32), broken={key index: {extension: bytes}}): n samples."""

    def make(
        path: Path,
        n: int,
        first: int = 0,
        size: tuple[int, int] = (48, 32),
        broken: dict[int, dict[str, bytes]] | None = None,
    ) -> Path:
        with tarfile.open(path, "w") as tar:
            for i in range(first, first + n):
                meta = {"caption": f"caption {i}", "alt_captions": [f"alt {i} a", f"alt {i} b"]}
                files = {
                    "jpg": jpeg(i, size),
                    "txt": f"caption {i}".encode(),
                    "json": json.dumps(meta).encode(),
                }
                for extension, data in (files | (broken or {}).get(i, {})).items():
                    member = tarfile.TarInfo(f"{i:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def make_video() -> Callable[..., Path]:
    """make_video(path, ticks, rate=24): a frame at each of `ticks` (1/rate seconds), the i-th of grey 3 i."""

    def make(path: Path, ticks: list[int], rate: int = 24, size: tuple[int, int] = (64, 48)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream("libx264", rate=rate, options={"crf": "10", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
            for i, tick in enumerate(ticks):
                pixels = np.full((size[1], size[0], 3), 3 * i, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, rate)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return path

    return make


@pytest.fixture
def make_timed() -> Callable[..., Path]:
    """make_timed(path, ticks, rate=24, codec="libx264", side=64, options={}): frames that carry their own time.

    A frame is shown at each of `ticks` (1/rate seconds; of any spacing) and shows the number of its tick as two rows
    of eight stripes, white for 1, which survive compression: `read_ticks` reads them.
    """

    def make(
        path: Path,
        ticks: list[int],
        rate: Any = 24,
        codec: str = "libx264",
        side: int = 64,
        options: dict[str, str] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        usual = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}.get(codec, {})
        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream(codec, rate=rate, options={"g": "12", **usual, **(options or {})})
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            stream.time_base = stream.codec_context.time_base = 1 / Fraction(rate)
            for tick in ticks:
                bits = (tick >> np.arange(16)) & 1
                grid = (255 * bits.reshape(2, 8)).astype(np.uint8).repeat(side // 2, 0).repeat(side // 8, 1)
                frame = av.VideoFrame.from_ndarray(np.stack([grid] * 3, 2), format="rgb24")
                frame.pts, frame.time_base = tick, 1 / Fraction(rate)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        if (
            sys.platform == "linux"
        ):  # for root SVT-AV1 takes real-time priority, and all that is started later has it too
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        return path

    return make


@pytest.fixture
def read_ticks() -> Callable[[Tensor], np.ndarray]:
    """read_ticks(video): the tick that each frame of a uint8 clip (3, f, h, w) shows, (f,) int."""

    def read(video: Tensor) -> np.ndarray:
        h, w = video.shape[2:]
        cells = video.float().mean(0).unflatten(1, (2, h // 2)).unflatten(3, (8, w // 8)).mean((2, 4))
        return ((cells > 128).flatten(1).numpy() << np.arange(16)).sum(1)

    return read


@pytest.fixture
def make_v2d() -> Callable[..., Path]:
    """make_v2d(path, {key: {extension: bytes, or an object for json}}): a shard as video2dataset writes it."""

    def make(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
        with tarfile.open(path, "w") as tar:
            for key, members in samples.items():
                for extension, content in members.items():
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def make_webvid(make_video: Callable[..., Path]) -> Callable[..., Path]:
    """make_webvid(root, n, frames=24, name="...", extra=[...]): n clips 0..n-1 and rows for `extra` ids."""

    def make(root: Path, n: int, frames: int = 24, name: str = "a caption", extra: tuple[str, ...] = ()) -> Path:
        ids = [f"{i:03d}" for i in range(n)]
        for video in ids:
            make_video(root / "mp4" / f"{video}.mp4", list(range(frames)))
        rows = [f"{video},,PT00H00M01S,mp4,{name}" for video in (*ids, *extra)]
        (root / "table.csv").write_text("\n".join(["videoid,contentUrl,duration,page_dir,name", *rows]))
        return root

    return make


class Recorder(LightningModule):
    """A model of one weight that writes down the keys of each batch it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(1, 1)
        self.keys: list[list[str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.keys.append(batch["key"])
        assert "skipped" not in batch
        return self.weight.weight.square().sum()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """fit(module, steps, **options of the Trainer and of fit): the keys of the batches trained on."""

    def run(
        module: Any,
        steps: int,
        ckpt_path: Path | None = None,
        callbacks: list[Any] | None = None,
        **options: Any,
    ) -> list[list[str]]:
        model = Recorder()
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=bool(callbacks),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(model, datamodule=module, ckpt_path=ckpt_path)
        return model.keys

    return run
