"""Tar shards, as img2dataset and WebDataset write them, indexed once by their headers and read at random.

A shard is an uncompressed tar whose members share a key per sample: `000000007.jpg`, `000000007.txt`,
`000000007.json`. The index holds where each member lies, so that reading one costs a seek and no scan. It can be kept
beside the shard (`make index`): many shards then open at once, and remote ones without being fetched.
"""

import csv
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from datamodules.remote import is_remote, local, options, whole


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: the shard it lies in, its key, (offset, size) in bytes of each member by extension, and what is
    known of it from elsewhere (a row of a CSV file)."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]
    meta: dict[str, Any] | None = None

    def read(self, extension: str) -> bytes:
        """The bytes of a member. Raises ValueError when the shard has become shorter since it was indexed."""
        offset, size = self.members[extension]
        data = os.pread(opened(local(self.shard)).fileno(), size, offset)
        if len(data) < size:
            raise ValueError("the shard ends within the sample")
        return data


@lru_cache(maxsize=64)
def opened(path: str) -> FileIO:
    """A shard that stays open, as opening it takes longer than to read a sample; closed when others take its place."""
    return open(path, "rb", buffering=0)


def expand(shards: str | Sequence[str]) -> list[str]:
    """Addresses of shards from paths or fsspec addresses (s3://, https://), brace ranges (`{00000..00007}.tar`), globs
    (`*.tar`) and folders; a folder without a tar may have a CSV instead.

    Raises FileNotFoundError for a path that is not there, a pattern or a folder without a match.
    """
    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for path in _braces(str(pattern)):
            if is_remote(path):
                found = [path] if "*" not in path else remote_glob(path)
            elif Path(path).is_dir():
                found = sorted(map(str, Path(path).glob("*.tar"))) or sorted(map(str, Path(path).glob("*.csv")))
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


def remote_glob(pattern: str) -> list[str]:
    """Addresses that match a glob, sorted."""
    system, path = fsspec.core.url_to_fs(pattern, **options(pattern))
    return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for i in range(int(first), int(last) + 1) for path in _braces(f"{head}{i:0{len(first)}d}{tail}")]


def index(paths: Sequence[str], required: Sequence[Sequence[str]]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The samples of all shards in file order, and what was left out as (file or "file:key", cause).

    Of each group in `required` (alternatives, such as ("jpg", "png")) a sample must have one extension. Of a
    truncated shard what can be read is kept. Raises ValueError when no sample is left at all.
    """
    entries: list[Entry] = []
    problems: list[tuple[str, str]] = []
    for path in paths:
        if path.endswith(".csv"):
            listed, unlisted = rows_of_csv(path, required[0])
            entries, problems = entries + listed, problems + unlisted
            continue
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


Row = TypeVar("Row")
FILES, TEXTS = ("filename", "file_name", "file", "path", "image"), ("caption", "text", "title", "prompt")


def rows_of_csv(table: str, extensions: Sequence[str]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The samples of a CSV file in a plain folder: a column with paths beside it, one with captions, any with metadata.

    A row with more cells than columns is damaged: a caption with a comma needs quotes. Raises ValueError where one of
    the two columns is missing.
    """
    entries: list[Entry] = []
    problems: list[tuple[str, str]] = []
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        try:
            header = {name.lower(): name for name in rows.fieldnames or []}
        except csv.Error:
            header = {}
        names = [next((header[name] for name in choice if name in header), None) for choice in (FILES, TEXTS)]
        if None in names:
            raise ValueError(f"{table} has the columns {', '.join(header) or 'of no name'}; needed are one with paths "
                             f"({', '.join(FILES)}) and one with captions ({', '.join(TEXTS)}).")  # fmt: skip
        for number, row in enumerate(csv_rows(rows), 1):
            if row is None or None in row:
                problems.append((f"{table}:row {number}", "the row of the CSV is damaged"))
                continue
            name = row[names[0]] or ""  # type: ignore[index]
            path = Path(table).parent / name
            extension = path.suffix[1:].lower()
            if extension not in extensions or not os.path.isfile(path):
                problems.append((f"{table}:{name[:200]}", "the file is missing or of another kind"))
                continue
            meta = {**row, "caption": row[names[1]]}  # type: ignore[index]
            entries.append(Entry(str(path), name, {extension: (0, path.stat().st_size)}, meta))
    return entries, problems


def csv_rows(reader: Iterator[Row]) -> Iterator[Row | None]:
    """Rows of a CSV file, None for one that is no CSV; an empty line is an empty row."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None


Members = dict[str, dict[str, tuple[int, int]]]  # key -> extension -> (offset, size)


def scan(address: str) -> tuple[Members, str]:
    """The complete members of a tar, and what is wrong with it or ""; from its index where it has one."""
    try:
        kept = read_index(address)
        if kept is not None:
            return kept, ""
        path = local(address)
    except FileNotFoundError:
        return {}, "the shard is not there"
    except ValueError as error:
        return {}, str(error)
    groups: Members = {}
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


def index_beside(address: str) -> str:
    """Where a shard's index is kept."""
    return f"{address.removesuffix('.tar')}.index.json"


def write_index(address: str) -> int:
    """Keep a shard's index beside it, also at a remote address. Returns the number of its samples."""
    groups, cause = scan(address)
    if cause:
        raise ValueError(f"{address}: {cause}")
    with whole(index_beside(address)) as part:
        part.write_text(json.dumps({"bytes": os.path.getsize(local(address)), "members": groups}))
    return len(groups)


def read_index(address: str) -> Members | None:
    """A shard's index as `write_index` left it; None if there is none, or it is of another size of the shard."""
    beside = index_beside(address)
    try:
        with open(local(beside)) as file:
            kept = json.load(file)
        if not is_remote(address) and kept["bytes"] != os.path.getsize(address):
            return None
        return {
            key: {extension: (offset, size) for extension, (offset, size) in members.items()}
            for key, members in kept["members"].items()
        }
    except (FileNotFoundError, PermissionError, ValueError, KeyError, TypeError, AttributeError):
        return None
