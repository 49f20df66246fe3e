"""Weight files of the feature networks: by path or address, always with their SHA-256."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from filelock import FileLock

RANDOM = "fixed-seed random network"


def need_file(weights: str | Path | None, *digests: str | None) -> None:
    """Raises ValueError for a SHA-256 without the file that it is of."""
    if weights is None and any(digest is not None for digest in digests):
        raise ValueError("A SHA-256 was given without the weight file it belongs to.")


def told(digest: str | None) -> str:
    """What a metric says of its weights; None = the network is random."""
    return RANDOM if digest is None else f"sha256:{digest}"


def located(weights: str | Path, sha256: str | None, what: str) -> tuple[Path, str]:
    """The file of `what` at a path or an http(s) address, and its SHA-256 in hex.

    An address needs `sha256`: the file is fetched into $MAKE_A_VIDEO_CACHE (by default ~/.cache/make-a-video) and takes
    its place there only with that digest. Raises FileNotFoundError where there is no file, OSError where the server
    does not answer, ValueError for another digest.
    """
    if not str(weights).startswith(("http://", "https://")):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There is no {what} weight file at {weights}.")
        return path, sha256_of(path, sha256)
    if not sha256:
        raise ValueError(f"The {what} weights at {weights} are only fetched with the SHA-256 that they must have.")
    folder = Path(os.environ.get("MAKE_A_VIDEO_CACHE", "~/.cache/make-a-video")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sha256.lower()[:16]}-{Path(urlsplit(str(weights)).path).name}"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            fetch(str(weights), path, sha256.lower(), what)
    return path, sha256_of(path, sha256)


def fetch(address: str, path: Path, sha256: str, what: str) -> None:
    try:  # into a file beside the path, which is moved there once the digest is right
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256, progress=False)
    except RuntimeError as error:
        raise ValueError(f"The {what} weights at {address} do not have the SHA-256 {sha256}: {error}") from error
    except OSError as error:
        raise OSError(f"The {what} weights could not be fetched from {address}: {error}") from error


def sha256_of(path: Path, expected: str | None = None) -> str:
    """SHA-256 of a file, in hex; raises ValueError where it is not the `expected` one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and digest != expected.lower():
        raise ValueError(f"{path} has the SHA-256 {digest}, but {expected} was expected.")
    return digest


def load_dict(path: Path) -> dict[str, Any]:
    """A dictionary that torch saved, read without running code; ValueError for any other file."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a weight file that PyTorch can read safely; it may be cut short.") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a plain dictionary of weights.")
    return weights
