"""Which captioned images are trained on, by their metadata: what Make-A-Video filters LAION by (NSFW, toxic words,
watermark probability above 0.5), and by size, shape, agreement of picture and caption, and language.

Keys are those of LAION's joined metadata and of img2dataset's JSON; the exact spelling counts first, then any case.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

Meta = Mapping[str, Any]
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han. A word of theirs is found anywhere.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
UNSPACED += "\U00020000-\U0003ffff"
# Soft hyphen, joiners, marks of direction and of emoji style may stand within a word and are not seen.
INVISIBLE = re.compile("[\u00ad\u200c-\u200f\u2060\ufe00-\ufe0f\ufeff]")


class MissingKeyError(ValueError):  # KeyError itself prints its message in quotes
    """A sample's metadata lack what a filter needs."""


@dataclass
class FilterConfig:
    """Limits of the filters, all of them off by default. A value exactly at a limit is kept."""

    punsafe: float | None = None  # drop above, 0..1; the paper names no limit, 0.1 is a common strict one
    pwatermark: float | None = None  # drop above, 0..1; the paper: 0.5
    toxic_words: str = ""  # path of a UTF-8 file, a word or phrase a line, comments after #
    min_side: int = 0  # pixels: drop if the short side of the original is less; 0 = off
    max_aspect: float = 0.0  # drop if long side / short side is more; 0 = off
    similarity: float | None = None  # drop below, -1..1: CLIP's cosine between picture and caption
    languages: list[str] = field(default_factory=list)  # keep only these codes, as [en, de]; none = off
    only: dict[str, list[str]] = field(default_factory=dict)  # of a key, keep only these values
    within: dict[str, str] = field(default_factory=dict)  # of a key, keep only the values in the file at this path
    without: dict[str, str] = field(default_factory=dict)  # of a key, drop the values in the file at this path
    missing: str = "error"  # a sample whose metadata lack the key: error | keep | drop


class Filters:
    """The filters that a config turns on, asked in the order of its fields; `active` has their names. Can be pickled.

    Raises ValueError for limits out of range, an unknown `missing`, a file of words that is empty or not UTF-8, and
    FileNotFoundError where there is no such file.
    """

    def __init__(self, config: FilterConfig) -> None:
        check(config)
        self.missing = config.missing
        filters: dict[str, tuple[str, Callable[[Meta, str], bool | None]]] = {}  # what it needs, in words, and itself
        for key, limit in (("punsafe", config.punsafe), ("pwatermark", config.pwatermark)):
            if limit is not None:
                filters[key] = f"a number under {key}", partial(above, key=key, limit=limit)
        if config.toxic_words:
            filters["toxic_words"] = "a caption", partial(toxic, words=read_words(config.toxic_words))
        size = "original_width and original_height, or width and height, in pixels"
        if config.min_side:
            filters["min_side"] = size, partial(small, limit=config.min_side)
        if config.max_aspect:
            filters["max_aspect"] = size, partial(elongated, limit=config.max_aspect)
        if config.similarity is not None:
            filters["similarity"] = "a number under similarity", partial(unlike, limit=config.similarity)
        if config.languages:
            codes = {code.lower() for code in config.languages}
            filters["languages"] = "a code under LANGUAGE or language", partial(foreign, codes=codes)
        for key, kept in config.only.items():
            filters[f"only {key}"] = f"a {key}", partial(other, key=key, kept=frozenset(kept))
        for key, path in config.within.items():
            filters[f"within {key}"] = f"a {key}", partial(other, key=key, kept=read_names(path))
        for key, path in config.without.items():
            filters[f"without {key}"] = f"a {key}", partial(listed, key=key, dropped=read_names(path))
        self._filters, self.active = filters, list(filters)

    def reason(self, meta: Meta, caption: str) -> str | None:
        """The name of the first filter that takes the sample, or None if it is kept.

        A value that is no finite number (None, NaN, text that does not parse) counts as missing. Then the next filter
        decides (missing=keep), or the reason is "<name> is missing" (drop), or MissingKeyError is raised (error).
        """
        for name, (needs, drops) in self._filters.items():
            verdict = drops(meta, caption)
            if verdict:
                return name
            if verdict is None and self.missing == "drop":
                return f"{name} is missing"
            if verdict is None and self.missing == "error":
                keys = ", ".join(sorted(map(str, meta))) or "none"
                raise MissingKeyError(f"The filter {name} needs {needs}, which this sample lacks (its keys: {keys}); "
                                      "missing=keep or missing=drop decides otherwise.")  # fmt: skip
        return None


def check(config: FilterConfig) -> None:
    """Raises ValueError for limits that make no sense."""
    if config.missing not in ("error", "keep", "drop"):
        raise ValueError(f"missing is '{config.missing}'; it is one of error, keep, drop.")
    for name, low in (("punsafe", 0), ("pwatermark", 0), ("similarity", -1)):
        limit = getattr(config, name)
        if limit is not None and not low <= limit <= 1:
            raise ValueError(f"The limit {name} is {limit}; give a number from {low} to 1.")
    if config.min_side < 0:
        raise ValueError(f"min_side is {config.min_side} pixels; give 0 (off) or more.")
    if config.max_aspect and not config.max_aspect >= 1:  # put this way it finds NaN too
        raise ValueError(f"max_aspect is {config.max_aspect}; long side / short side is at least 1, and 0 is off.")
    for code in config.languages:
        if not re.fullmatch("[A-Za-z]{2,3}(-[A-Za-z0-9]+)*", code):  # YAML reads Norwegian, a bare no, as False
            raise ValueError(f"'{code}' in languages is no language code; give codes like en, and in quotes 'no'.")


# The filters: True takes the sample, False keeps it, None means that the metadata lack what it needs.


def above(meta: Meta, caption: str, key: str, limit: float) -> bool | None:
    value = number(meta, key)
    return None if value is None else value > limit


def unlike(meta: Meta, caption: str, limit: float) -> bool | None:
    value = number(meta, "similarity")
    return None if value is None else value < limit


def toxic(meta: Meta, caption: str, words: re.Pattern[str]) -> bool:
    return words.search(fold(caption)) is not None


def small(meta: Meta, caption: str, limit: int) -> bool | None:
    size = sides(meta)
    return None if size is None else min(size) < limit


def elongated(meta: Meta, caption: str, limit: float) -> bool | None:
    size = sides(meta)
    return None if size is None else max(size) / min(size) > limit


def foreign(meta: Meta, caption: str, codes: set[str]) -> bool | None:
    found = [code.strip().lower() for code in values(meta, "LANGUAGE") if isinstance(code, str) and code.strip()]
    return found[0] not in codes if found else None


def other(meta: Meta, caption: str, key: str, kept: frozenset[str]) -> bool | None:
    found = values(meta, key)
    return str(found[0]) not in kept if found else None


def listed(meta: Meta, caption: str, key: str, dropped: frozenset[str]) -> bool | None:
    found = values(meta, key)
    return str(found[0]) in dropped if found else None


def values(meta: Meta, key: str) -> list[Any]:
    """What stands under a key: its exact spelling first, then others, as LAION has both punsafe and PUNSAFE."""
    names = [name for name in meta if name.lower() == key.lower()]
    return [meta[name] for name in sorted(names, key=lambda name: name != key)]


def number(meta: Meta, key: str) -> float | None:
    """The first finite number under a key, also if it is written as text."""
    for value in values(meta, key):
        try:
            if not isinstance(value, bool) and math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return None


def sides(meta: Meta) -> tuple[float, float] | None:
    """Width and height in pixels, of the original where both are known, else of the stored picture."""
    for prefix in ("original_", ""):
        width, height = number(meta, f"{prefix}width"), number(meta, f"{prefix}height")
        if width and height and min(width, height) > 0:
            return width, height
    return None


def fold(text: str) -> str:
    """Text in which case, width, runs of space, and accents as one character or two make no difference."""
    return " ".join(normalize("NFKC", INVISIBLE.sub("", text)).casefold().split())


def read_names(path: str) -> frozenset[str]:
    """The names in a text file, one a line, comments after ` #`.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no list of names at {path}.")
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = frozenset(re.split(r"(?:^|\s)#", line)[0].strip() for line in lines) - {""}
    if not names:
        raise ValueError(f"The list {path} has no names; give one a line.")
    return names


def read_words(path: str) -> re.Pattern[str]:
    """One pattern that finds the words and phrases of a file, whole, in folded text; errors as in Filters."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of toxic words at {path}.")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"The file of toxic words {path} is not UTF-8; save it as UTF-8.") from error
    # A # within a word, as in C#, begins no comment: cut there, the letter before it would take every sample it is in.
    words = {fold(re.split(r"(?:^|\s)#", line)[0]) for line in lines} - {""}
    if not words:
        raise ValueError(f"The file of toxic words {path} has no words; give one word or phrase a line.")
    # Python's \b will not do: for it a vowel sign of Hindi ends a word, and an underscore does not.
    marks = [c for c in map(chr, range(0x20000)) if category(c) in ("Mn", "Mc") and not re.match(f"[{UNSPACED}]", c)]
    letter, mark = rf"[^\W_{UNSPACED}]", f"[{''.join(marks)}]"
    start = rf"(?:(?<!{letter})(?<!{mark})|(?=[{UNSPACED}]))"
    end = rf"(?:(?!{letter}|{mark})|(?<=[{UNSPACED}]))"
    return re.compile(f"{start}(?:{'|'.join(map(re.escape, sorted(words)))}){end}")
