"""Tar shards, as img2dataset and WebDataset write them, indexed once by their headers and read at random.

A shard is an uncompressed tar whose members share a key per sample: `000000007.jpg`, `000000007.txt`,
`000000007.json`. The index holds where each member lies, so that reading one costs a seek and no scan.
"""

import glob
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: the shard it lies in, its key, and (offset, size) in bytes of each member by extension."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """The bytes of a member. Raises ValueError when the shard has become shorter since it was indexed."""
        offset, size = self.members[extension]
        with open(self.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError("the shard ends within the sample")
        return data


def expand(shards: str | Sequence[str]) -> list[str]:
    """Paths of shards from paths, brace ranges (`{00000..00007}.tar`), globs (`*.tar`) and folders.

    Raises FileNotFoundError for a path that is not there, a pattern or a folder without a match.
    """
    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for path in _braces(str(pattern)):
            if Path(path).is_dir():
                found = sorted(str(file) for file in Path(path).glob("*.tar"))
            elif Path(path).exists():
                found = [path]
            else:
                found = sorted(glob.glob(path))
            if not found:
                raise FileNotFoundError(
                    f"There is no shard at {path}; give a .tar file, a folder of them, a glob (*.tar) "
                    "or a brace range ({00000..00007}.tar)."
                )
            paths += found
    if not paths:
        raise ValueError("The list of shards is empty; give at least one .tar file, folder or pattern.")
    return paths


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for i in range(int(first), int(last) + 1) for path in _braces(f"{head}{i:0{len(first)}d}{tail}")]


def index(paths: Sequence[str], required: Sequence[Sequence[str]]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The samples of all shards in file order, and what was left out as (file or "file:key", cause).

    Of each group in `required` (alternatives, such as ("jpg", "png")) a sample must have one extension.
    Of a
    truncated shard what can be read is kept. Raises ValueError when no sample is left at all.
    """
    entries: list[Entry] = []
    problems: list[tuple[str, str]] = []
    for path in paths:
        groups, cause = scan(path)
        if cause:
            problems.append((path, cause))
        for key, members in groups.items():
            if all(any(extension in members for extension in group) for group in required):
                entries.append(Entry(path, key, members))
            else:
                problems.append((f"{path}:{key}", "the sample lacks one of its files"))
    if not entries:
        expected = " and ".join("KEY." + "/".join(group) for group in required)
        causes = "; ".join(f"{name}: {cause}" for name, cause in problems[:3]) or "the shards hold no files"
        raise ValueError(
            f"No sample could be read from {paths[0]}{' and others' if len(paths) > 1 else ''} ({causes}); "
            f"expected are uncompressed tar files with {expected} for each sample."
        )
    return entries, problems


def scan(path: str) -> tuple[dict[str, dict[str, tuple[int, int]]], str]:
    """The complete members of a tar, {key: {extension: (offset, size)}}, and what is wrong with it or ""."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        size = Path(path).stat().st_size
        if size == 0:
            return groups, "the shard is empty"
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    return groups, "the shard is truncated"
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")  # as WebDataset: the key ends at the first dot
                key = f"{folder}/{stem}" if folder else stem
                groups.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        cause = "the shard is truncated" if groups else "the file is not an uncompressed tar"
        return groups, f"{cause} ({type(error).__name__})"
    return groups, ""
