"""Shards at other addresses, on a server that fails now and then."""

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule, embeddings, remote
from datamodules.filters import FilterConfig
from datamodules.image_text import open_pairs
from datamodules.tars import expand, index_beside, write_index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAKE_A_VIDEO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Server:
    """Serves a folder; `moods` are what the next requests of a file meet: 503, "stall", "cut"."""

    def __init__(self, folder: Path) -> None:
        self.moods: dict[str, list[Any]] = {}
        self.requests: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET(body=False)

            def do_GET(self, body: bool = True) -> None:
                name = self.path.lstrip("/")
                path = folder / name
                mood = server.moods.get(name, []).pop(0) if body and server.moods.get(name) else 200
                server.requests[name] += body
                if not path.is_file() or mood in (404, 503):
                    self.send_error(mood if mood == 503 else 404)
                    return
                data = path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body and mood == "stall":
                    time.sleep(1.0)
                elif body:
                    self.wfile.write(data[: len(data) // 2] if mood == "cut" else data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, make_shard: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    for i in range(2):
        make_shard(tmp_path / "served" / f"{i:05d}.tar", 5, first=5 * i)
    monkeypatch.setattr(remote, "STALL", 0.3)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    running = Server(tmp_path / "served")
    yield running
    running.http.shutdown()


@pytest.mark.parametrize("mood", [503, "stall", "cut"])
def test_a_server_that_fails_is_asked_again(server: Server, mood: Any) -> None:
    server.moods["00001.tar"] = [mood, mood]
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 5, 16)
    keys = [key for batch in islice(iter(data.train_dataloader()), 2) for key in batch["key"]]
    assert sorted(keys) == [f"{i:09d}" for i in range(10)]
    assert server.requests["00001.tar"] == 3 and server.requests["00000.tar"] == 1


def test_a_shard_that_cannot_be_had_is_skipped_and_counted(
    server: Server, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    server.moods["00001.tar"] = [503] * 100
    with caplog.at_level(logging.WARNING):
        data = ImageTextDataModule([server.address + "/{00000..00002}.tar"], 5, 16, max_skipped=0.7)
        data.setup()
    assert len(data.sources()[0]) == 5
    assert sum(data.skipped.values()) == 2 and "the shard is not there" in data.skipped
    assert any("4 attempts" in cause for cause in data.skipped)
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("window, workers", [(0, 0), (1, 0), (1, 2)])
@pytest.mark.parametrize("mood", [503, "stall"])
def test_a_shard_that_dies_later_is_asked_for_once_and_the_run_goes_on(
    server: Server, tmp_path: Path, make_shard: Any, mood: Any, window: int, workers: int
) -> None:
    for i in range(2):
        write_index(str(make_shard(tmp_path / "served" / f"{i:05d}.tar", 30, first=30 * i)))
    server.moods["00001.tar"] = [mood] * 100
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 6, 8, window=window, workers=workers)
    keys = [
        key
        for batch in islice(iter(data.train_dataloader()), 10)
        for key in data.on_before_batch_transfer(batch, 0)["key"]
    ]
    assert len(keys) == 60 and set(keys) == {f"{i:09d}" for i in range(30)}
    ((cause, n),) = data.skipped.items()
    assert "could not be fetched in 4 attempts" in cause and n == 30
    assert server.requests["00001.tar"] == 4


@pytest.mark.parametrize("mood", [503, "stall"])
def test_a_shard_of_clips_that_dies_is_replaced(
    server: Server, tmp_path: Path, make_video: Any, make_v2d: Any, mood: Any
) -> None:
    video = make_video(tmp_path / "a.mp4", list(range(12))).read_bytes()
    for i in range(2):
        samples = {f"{i}{n}": {"mp4": video, "json": {"status": "success"}} for n in range(4)}
        write_index(str(make_v2d(tmp_path / "served" / f"{i:05d}.tar", samples)))
    server.moods["00000.tar"], server.moods["00001.tar"] = [mood] * 2, [mood] * 100
    root = server.address + "/{00000..00001}.tar"
    data = VideoDataModule(root, 4, 2, 8, curriculum=Curriculum(steps=5))
    batches = islice(iter(data.train_dataloader()), 4)
    assert {key[0] for batch in batches for key in data.on_before_batch_transfer(batch, 0)["key"]} == {"0"}
    ((cause, n),) = data.skipped.items()
    assert "could not be fetched in 4 attempts" in cause and n == 8
    assert server.requests == {"00000.tar": 3, "00001.tar": 4, "00000.index.json": 1, "00001.index.json": 1}


def test_what_failed_is_tried_again_after_a_while_and_in_a_new_run(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.address + "/00000.tar"
    server.moods["00000.tar"] = [503] * 8
    for asked in (4, 8):
        for _ in range(3):
            with pytest.raises(ValueError, match="could not be fetched in 4 attempts"):
                remote.local(address)
        assert server.requests["00000.tar"] == asked
        (marker,) = cache.glob("*.failed")
        if asked == 4:
            os.utime(marker, (time.time() - remote.FORGET,) * 2)
    monkeypatch.setattr(remote, "STARTED", time.time() + 1)
    assert Path(remote.local(address)).exists()


def test_an_index_beside_the_shard_saves_fetching_it(server: Server, tmp_path: Path) -> None:
    for i in range(2):
        assert write_index(str(tmp_path / "served" / f"{i:05d}.tar")) == 5
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 1, 16, window=1)
    data.setup()
    assert server.requests["00000.tar"] == server.requests["00001.tar"] == 0
    for batch in islice(iter(data.train_dataloader()), 5):
        assert batch["image"].shape == (1, 3, 16, 16)
    assert server.requests["00000.tar"] + server.requests["00001.tar"] == 1  # a window of one shard


def test_a_shard_that_is_gone_does_not_stop_the_filters(server: Server, tmp_path: Path) -> None:
    for i in range(2):
        write_index(str(tmp_path / "served" / f"{i:05d}.tar"))
    (tmp_path / "served" / "00001.tar").unlink()
    filters = FilterConfig(punsafe=0.5, missing="keep")
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 5, 16, filters=filters)
    assert len(data.sources()[0]) == 5
    assert data.skipped == {"the file is missing": 1} and server.requests["00001.tar"] == 1


def test_a_stale_index_is_not_believed(tmp_path: Path, make_shard: Any) -> None:
    path = str(make_shard(tmp_path / "a.tar", 3))
    write_index(path)
    make_shard(tmp_path / "a.tar", 40, first=50)
    assert [entry.key for entry in open_pairs([path], 8)[0].entries][0] == "000000050"
    Path(index_beside(path)).write_text("{broken")
    assert len(open_pairs([path], 8)[0]) == 40


def test_indices_and_embeddings_are_written_at_the_shards_address(tmp_path: Path, make_shard: Any) -> None:
    memory = fsspec.filesystem("memory")
    memory.put_file(str(make_shard(tmp_path / "a.tar", 4)), "/pairs/00000.tar")
    (shard,) = expand("memory://pairs/*.tar")
    assert shard == "memory:///pairs/00000.tar" or shard == "memory://pairs/00000.tar"
    assert write_index(shard) == 4
    assert memory.exists("/pairs/00000.index.json")
    pairs = open_pairs([shard], 8)[0]
    embeddings.write(pairs.entries, "clip", torch.ones(4, 3), torch.ones(4, 3))
    assert memory.exists("/pairs/00000.clip.safetensors")
    batch = next(iter(ImageTextDataModule(shard, 4, 0, clip="clip").train_dataloader()))
    assert batch["image_embedding"].shape == (4, 3)
    memory.rm("/pairs", recursive=True)


def test_the_cache_makes_room(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Path(remote.local(server.address + "/00000.tar"))
    monkeypatch.setenv("MAKE_A_VIDEO_CACHE_GIB", str(first.stat().st_size * 0.9 / 2**30))
    second = Path(remote.local(server.address + "/00001.tar"))
    assert second.exists() and not first.exists()


def test_many_make_room_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for i in range(400):
        (cache / f"{i}.tar").write_bytes(b"x" * 100)
    (cache / "old.part").write_bytes(b"what a killed process left")
    (cache / "new.part").write_bytes(b"what another is writing")
    os.utime(cache / "old.part", (0, 0))
    monkeypatch.setenv("MAKE_A_VIDEO_CACHE_GIB", str(1000 / 2**30))
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(remote.make_room, cache) for _ in range(8)]:
            done.result()
    assert len(list(cache.glob("*.tar"))) == 9 and [path.name for path in cache.glob("*.part")] == ["new.part"]


def test_a_process_killed_in_writing_leaves_nothing_for_good(tmp_path: Path) -> None:
    address = str(tmp_path / "a.json")
    child = os.fork()
    if not child:
        with remote.whole(address) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not os.path.exists(address)
    with remote.whole(address) as part:
        part.write_text("all")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "all")]


@pytest.mark.parametrize("mood", [503, "stall", "cut"])
def test_clips_are_asked_for_again(server: Server, tmp_path: Path, make_v2d: Any, make_timed: Any, mood: Any) -> None:
    video = make_timed(tmp_path / "a.mp4", list(range(24))).read_bytes()
    make_v2d(tmp_path / "served" / "v.tar", {str(i): {"mp4": video, "json": {}} for i in range(4)})
    server.moods["v.tar"] = [mood, mood]
    data = VideoDataModule(server.address + "/v.tar", 4, 8, 16, curriculum=Curriculum(steps=9))
    (batch,) = islice(iter(data.train_dataloader()), 1)
    assert sorted(batch["key"]) == list("0123") and server.requests["v.tar"] == 3 and not batch["skipped"]


@pytest.fixture
def embedded(server: Server, tmp_path: Path) -> list[str]:
    """The names of both shards' embeddings on the server."""
    for i in range(2):
        shard = str(tmp_path / "served" / f"{i:05d}.tar")
        embeddings.write(open_pairs([shard], 8)[0].entries, "clip", torch.ones(5, 3), torch.ones(5, 3))
    return [f"{i:05d}.clip.safetensors" for i in range(2)]


@pytest.mark.parametrize("mood", [503, "stall", "cut"])
def test_embeddings_are_asked_for_again(server: Server, embedded: list[str], mood: Any) -> None:
    server.moods[embedded[1]] = [503, 503, 200, mood, mood]  # is it there? and then for all of it
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 10, 0, clip="clip")
    (batch,) = islice(iter(data.train_dataloader()), 1)
    assert len(set(batch["key"])) == 10 and batch["image_embedding"].shape == (10, 3)
    assert server.requests[embedded[1]] == 6


def test_embeddings_that_cannot_be_had_are_counted(server: Server, embedded: list[str]) -> None:
    server.moods[embedded[1]] = [200] + [503] * 100
    data = ImageTextDataModule(server.address + "/{00000..00001}.tar", 10, 0, clip="clip")
    for batch in islice(iter(data.train_dataloader()), 2):
        assert {int(key) for key in data.on_before_batch_transfer(batch, 0)["key"]} <= set(range(5))
    assert set(data.skipped) == {"the embeddings of the shard could not be fetched"}
    assert server.requests[embedded[1]] == 5
    server.moods[embedded[1]] = [503] * 100
    with pytest.raises(ValueError, match=f"whether there is a file at .*{embedded[1]}: 4 attempts failed"):
        ImageTextDataModule(server.address + "/{00000..00001}.tar", 10, 0, clip="clip").setup()
    server.moods[embedded[1]] = [404]
    with pytest.raises(FileNotFoundError, match="make embed"):
        ImageTextDataModule(server.address + "/{00000..00001}.tar", 10, 0, clip="clip").setup()


def test_what_is_fetched_at_once_is_fetched_once(server: Server) -> None:
    threads = [threading.Thread(target=remote.local, args=(server.address + "/00000.tar",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests["00000.tar"] == 1
