"""Weight files: by path, or from a server into the cache, never with another digest."""

import hashlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from lightning_modules.metrics import FrechetInceptionDistance
from lightning_modules.metrics.weights import load_dict, located

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server of a folder that holds w.pt; the cache is empty."""
    monkeypatch.setenv("MAKE_A_VIDEO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served/w.pt").write_bytes(CONTENT)
    Quiet.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_an_address_is_fetched_once(server, tmp_path):
    path, digest = located(f"{server}/w.pt?dl=1", DIGEST.upper(), "I3D")
    assert path.read_bytes() == CONTENT and digest == DIGEST
    assert path.parent == tmp_path / "cache" and path.name == f"{DIGEST[:16]}-w.pt"
    assert located(f"{server}/w.pt?dl=1", DIGEST, "I3D") == (path, digest)
    assert Quiet.asked == ["/w.pt?dl=1"]


def test_an_address_needs_a_digest_and_that_digest(server, tmp_path):
    with pytest.raises(ValueError, match="are only fetched with the SHA-256"):
        located(f"{server}/w.pt", None, "I3D")
    with pytest.raises(ValueError, match=f"I3D weights at {server}/w.pt do not have the SHA-256 {'0' * 64}"):
        located(f"{server}/w.pt", "0" * 64, "I3D")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]  # nothing of it stays


def test_a_file_that_changed_in_the_cache_is_refused(server):
    path, _ = located(f"{server}/w.pt", DIGEST, "I3D")
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"but {DIGEST} was expected"):
        located(f"{server}/w.pt", DIGEST, "I3D")


def test_a_server_without_the_file(server):
    with pytest.raises(OSError, match=f"could not be fetched from {server}/none.pt: .*404"):
        located(f"{server}/none.pt", DIGEST, "C3D")


def test_a_path(tmp_path: Path):
    (tmp_path / "w.pt").write_bytes(CONTENT)
    assert located(tmp_path / "w.pt", None, "I3D") == (tmp_path / "w.pt", DIGEST)
    with pytest.raises(FileNotFoundError, match="There is no C3D weight file at .*none.pt"):
        located(tmp_path / "none.pt", None, "C3D")
    with pytest.raises(ValueError, match=f"has the SHA-256 {DIGEST}, but 00 was expected"):
        located(tmp_path / "w.pt", "00", "I3D")


def test_metrics_take_addresses_and_know_the_digest_of_inception(server):
    with pytest.raises(ValueError, match="do not have the SHA-256 6726825d"):
        FrechetInceptionDistance(f"{server}/w.pt")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut", b"\x80\x02garbage"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a weight file that PyTorch can read safely"):
        load_dict(tmp_path / "w.pt")


def test_a_file_cut_short_or_of_something_else(tmp_path: Path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt")
    assert load_dict(tmp_path / "w.pt")["a"].sum() == 1000
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match="may be cut short"):
        load_dict(tmp_path / "cut.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="not a plain dictionary"):
        load_dict(tmp_path / "list.pt")
