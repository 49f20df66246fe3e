"""Files at any fsspec address (S3, HTTP, GCS, ...), fetched whole into a folder of this machine when first needed.

The folder is $MAKE_A_VIDEO_CACHE, by default ~/.cache/make-a-video. With $MAKE_A_VIDEO_CACHE_GIB set, the files that
were not used for longest make room for new ones.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import fsspec
from filelock import FileLock

log = logging.getLogger(__name__)

ATTEMPTS = 4
DAY = 86400.0  # seconds
STALL = 60.0  # seconds without a byte after which a server is given up
FORGET = 1800.0  # seconds for which an address that could not be had is not asked for again
STARTED = time.time()  # what failed in an earlier run is asked for again


def is_remote(address: str) -> bool:
    return "://" in address


def local(address: str) -> str:
    """The path of a file on this machine; a remote one is fetched if it is not here yet.

    Raises FileNotFoundError where the server has no such file, ValueError where it cannot be had after retries, and
    for `FORGET` seconds after that at once, in all workers and ranks that share the folder.
    """
    if not is_remote(address):
        return address
    path = folder() / (hashlib.sha256(address.encode()).hexdigest()[:24] + Path(address.split("?")[0]).suffix)
    try:
        os.utime(path)
    except FileNotFoundError:
        with FileLock(f"{path}.lock"):  # workers of all ranks want the same shard at the same time
            if not path.exists():
                if cause := given_up(path):
                    raise ValueError(cause) from None
                make_room(path.parent)
                fetch(address, path)
    return str(path)


def fetch(address: str, path: Path) -> None:
    """Copy a remote file to `path`, whole or not at all, with retries that wait longer each time."""
    part = path.with_name(path.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            system, remote = fsspec.core.url_to_fs(address, **options(address))
            system.get_file(remote, str(part))
            os.replace(part, path)
            return
        except (FileNotFoundError, PermissionError):  # S3 forbids what is not there
            raise FileNotFoundError(f"There is no file at {address}, or none that may be read.") from None
        except Exception as error:  # every kind of server has errors of its own
            cause = type(error).__name__
            log.warning("Could not fetch %s (%s: %s), attempt %d.", address, cause, error, attempt + 1)
            time.sleep(2.0**attempt if attempt < ATTEMPTS - 1 else 0)
    cause = f"the shard could not be fetched in {ATTEMPTS} attempts ({cause})"
    marker(path).write_text(cause)
    raise ValueError(cause)


def given_up(path: Path) -> str:
    """Why a file was given up in this run a short while ago; "" if it was not."""
    try:
        recent = marker(path).stat().st_mtime > max(STARTED, time.time() - FORGET)
        return marker(path).read_text() if recent else ""
    except FileNotFoundError:
        return ""


def marker(path: Path) -> Path:
    return path.with_name(path.name + ".failed")


def exists(address: str) -> bool:
    """Is there a file? Raises ValueError where the server does not say so after retries."""
    if not is_remote(address):
        return os.path.exists(address)
    # Else any answer of an HTTP server but yes is taken for no: a 503 too.
    strict = {"strict": True} if address.startswith("http") else {}
    for attempt in range(ATTEMPTS):
        try:
            system, remote = fsspec.core.url_to_fs(address, **options(address))
            return bool(system.exists(remote, **strict))
        except (FileNotFoundError, PermissionError):  # S3 forbids what is not there
            return False
        except Exception as error:
            cause = type(error).__name__
            log.warning("Could not ask for %s (%s: %s), attempt %d.", address, cause, error, attempt + 1)
            time.sleep(2.0**attempt if attempt < ATTEMPTS - 1 else 0)
    raise ValueError(f"Nobody says whether there is a file at {address}: {ATTEMPTS} attempts failed ({cause}).")


@contextmanager
def whole(address: str) -> Iterator[Path]:
    """A path to write to, which takes its place at the address when all is written, and not before."""
    if is_remote(address):
        part = folder() / f"{uuid4().hex}.part"
    else:
        part = Path(f"{address}.part")  # by this name what a killed process leaves is written over by the next
    with part.open("ab") as file:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be writing the same
        try:
            yield part
            if is_remote(address):
                system, remote = fsspec.core.url_to_fs(address, **options(address))
                system.put_file(str(part), remote)
            else:
                os.replace(part, address)
        finally:
            part.unlink(missing_ok=True)


def options(address: str) -> dict[str, Any]:
    """For HTTP a limit of time between two bytes: a server that stalls must not stop a run."""
    if not address.startswith("http"):
        return {}
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)}}


def folder() -> Path:
    path = Path(os.environ.get("MAKE_A_VIDEO_CACHE", "~/.cache/make-a-video")).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def make_room(cache: Path) -> None:
    """Remove the files unused for longest until the cache is below its limit, and what killed processes left."""
    limit = float(os.environ.get("MAKE_A_VIDEO_CACHE_GIB", "inf")) * 2**30
    with FileLock(cache / "room.lock"):
        files = []
        for entry in os.scandir(cache):
            with suppress(FileNotFoundError):  # another process was faster
                stat, kind = entry.stat(), Path(entry.name).suffix
                if kind == ".part" and time.time() - stat.st_mtime > DAY:
                    os.unlink(entry.path)
                elif kind not in (".lock", ".part"):
                    files.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for used, size, file in sorted(files):
            if total < limit:
                return
            with suppress(FileNotFoundError):
                if file.stat().st_mtime == used:  # else another process has just asked for it
                    file.unlink()  # a reader that has it open keeps it
                    total -= size
