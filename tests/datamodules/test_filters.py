"""Filters on metadata: what they take at, above and below a limit, and what becomes of samples without a key."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from datamodules.filters import FilterConfig, Filters, MissingKeyError

# What img2dataset writes, with the columns of LAION that its user asked for.
META: dict[str, Any] = {
    "url": "https://example.org/cat.jpg",
    "caption": "a cat",
    "key": "000000000",
    "status": "success",
    "width": 256,
    "height": 192,
    "original_width": 1024,
    "original_height": 768,
    "punsafe": 0.01,
    "pwatermark": 0.2,
    "similarity": 0.33,
    "LANGUAGE": "en",
}


def reason(meta: dict[str, Any], caption: str = "a cat", **limits: Any) -> str | None:
    return Filters(FilterConfig(**limits)).reason(meta, caption)


@pytest.fixture
def takes(tmp_path: Path) -> Callable[[str, str], bool]:
    """takes(file of words, caption): does the filter of toxic words take it?"""

    def run(words: str, caption: str) -> bool:
        (tmp_path / "words.txt").write_text(words, encoding="utf-8")
        answer = reason({}, caption, toxic_words=str(tmp_path / "words.txt"))
        assert answer in (None, "toxic_words")
        return answer is not None

    return run


@pytest.mark.parametrize("missing", ["error", "keep", "drop"])
def test_nothing_is_filtered_when_all_is_off(missing: str) -> None:
    filters = Filters(FilterConfig(missing=missing))
    assert filters.active == []
    for meta in ({}, META, {"punsafe": 1.0, "pwatermark": 1.0, "similarity": -1, "width": 1, "height": 9999}):
        assert filters.reason(meta, "") is None


@pytest.mark.parametrize("key", ["punsafe", "pwatermark"])
@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5, 1.0])
def test_a_probability_above_its_limit_is_taken_and_one_at_it_is_not(key: str, limit: float) -> None:
    limits: dict[str, Any] = {key: limit}
    assert reason({key: limit}, **limits) is None
    assert reason({key: math.nextafter(limit, -1)}, **limits) is None
    assert reason({key: math.nextafter(limit, 2)}, **limits) == key


def test_a_similarity_below_its_limit_is_taken_and_one_at_it_is_not() -> None:
    for limit in (-1.0, 0.0, 0.3):
        assert reason({"similarity": limit}, similarity=limit) is None
        assert reason({"similarity": math.nextafter(limit, 2)}, similarity=limit) is None
        assert reason({"similarity": math.nextafter(limit, -2)}, similarity=limit) == "similarity"


@pytest.mark.parametrize("turned", [False, True])
def test_the_short_side_is_measured_whichever_it_is(turned: bool) -> None:
    for short, answer in ((255, "min_side"), (256, None), (257, None)):
        width, height = (short, 999) if turned else (999, short)
        assert reason({"width": width, "height": height}, min_side=256) == answer


@pytest.mark.parametrize("turned", [False, True])
def test_the_aspect_ratio_is_long_by_short(turned: bool) -> None:
    # 11 / 10 is the float nearest to 1.1, so that a limit written in decimals is met exactly.
    cases = ((1100, 1000, 1.1, None), (1101, 1000, 1.1, "max_aspect"), (7, 7, 1.0, None), (8, 7, 1.0, "max_aspect"))
    for long, short, limit, answer in cases:
        width, height = (short, long) if turned else (long, short)
        assert reason({"width": width, "height": height}, max_aspect=limit) == answer


def test_the_size_is_the_originals_where_it_is_known() -> None:
    stored = {"width": 256, "height": 256}
    assert reason(stored, min_side=512) == "min_side"
    assert reason({**stored, "original_width": 512, "original_height": 600}, min_side=512) is None
    assert reason({**stored, "original_width": 900, "original_height": 300}, max_aspect=2.0) == "max_aspect"
    for height in (None, math.nan, 0, -1):  # half an original is none
        half = {**stored, "original_width": 900, "original_height": height}
        assert reason(half, min_side=257) == "min_side" and reason(half, min_side=256, max_aspect=1.0) is None


@pytest.mark.parametrize("key", ["LANGUAGE", "language", "Language"])
def test_only_listed_languages_are_kept(key: str) -> None:
    for value, answer in (("en", None), ("EN", None), (" de ", None), ("fr", "languages"), ("eng", "languages")):
        assert reason({key: value}, languages=["en", "De"]) == answer
    for value in (None, "", " ", math.nan, 3):
        assert reason({key: value}, languages=["en"], missing="drop") == "languages is missing"


def test_words_are_found_whole(takes: Callable[[str, str], bool]) -> None:
    for caption in ("ass", "an ass.", "ASS", "kick-ass", "(Ass)", "big_ass_car.jpg", "my\tass\n", "❤️ass"):
        assert takes("ass", caption), caption
    for caption in ("", "class", "assassin", "bass", "a glass", "ass2", "as s"):
        assert not takes("ass", caption), caption


def test_phrases_are_found_over_any_space_but_not_in_pieces(takes: Callable[[str, str], bool]) -> None:
    words = "Foul   phrase\nbad"
    for caption in ("a foul phrase", "FOUL\n phrase!", "foul\u00a0phrase", "bad"):
        assert takes(words, caption), caption
    for caption in ("foul", "phrase", "foul paraphrase", "foul phrases", "foulphrase", "foul, phrase"):
        assert not takes(words, caption), caption


def test_what_stands_in_the_list_is_text_and_no_pattern(takes: Callable[[str, str], bool]) -> None:
    assert takes("b.d", "a b.d one") and not takes("b.d", "a bad one")
    assert takes("f**k\n(x", "what the f**k") and not takes("f**k\n(x", "fk")


def test_letters_that_read_alike_are_alike(takes: Callable[[str, str], bool]) -> None:
    assert takes("straße", "STRASSE") and takes("ＢＡＤ", "bad") and takes("bad", "ｂａｄ") and takes("bad", "𝐁𝐀𝐃")
    assert takes("caf\u00e9", "CAFE\u0301") and takes("cafe\u0301", "caf\u00e9")
    assert not takes("cafe", "caf\u00e9") and not takes("caf", "cafe\u0301")
    assert takes("assault", "as\u00adsault") and not takes("sault", "as\u00adsault")  # a soft hyphen


@pytest.mark.parametrize(
    "word, within, beside",
    [
        ("хлеб", "хлебный", "Белый ХЛЕБ!"),  # Cyrillic
        ("λόγος", "διάλογος", "Ο ΛΌΓΟΣ."),  # Greek, whose sigma has a form for the end of a word
        ("كلب", "كلبي", "هذا كلب، هنا"),  # Arabic
        ("कम", "कमी", "यह कम है।"),  # Hindi: the vowel sign behind is no letter to Python's regular expressions
        ("न", "चीन", "यह न हो"),  # and before
        ("바보", "바보상자", "그 바보!"),  # Korean
    ],
)
def test_words_of_other_scripts_are_found_whole(
    takes: Callable[[str, str], bool], word: str, within: str, beside: str
) -> None:
    assert takes(word, word) and takes(word, beside) and not takes(word, within)


@pytest.mark.parametrize(
    "word, caption", [("笨蛋", "你是个笨蛋吗"), ("バカ", "お前はﾊﾞｶだ"), ("เลว", "คนเลวมาก"), ("ดี", "คนดีมาก")]
)
def test_scripts_without_spaces_have_no_ends_of_words(
    takes: Callable[[str, str], bool], word: str, caption: str
) -> None:
    assert takes(word, caption) and takes(word, f"x{word}x") and not takes(word, caption[: len(caption) // 2])
    assert takes("ass", f"{word}ass{word}") and not takes("ass", f"{word}class{word}")


def test_comments_and_empty_lines_are_no_words(takes: Callable[[str, str], bool]) -> None:
    words = "\ufeff# a list\n\n  bad  # a remark\n#ugly\n"
    assert takes(words, "bad")
    assert not any(takes(words, caption) for caption in ("", " ", "a list", "# a list", "a remark", "ugly", "#"))
    assert takes("c# sharp", "C# sharp") and not takes("c# sharp", "vitamin c")


def test_a_file_of_words_that_gives_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    with pytest.raises(FileNotFoundError, match="words.txt"):
        Filters(FilterConfig(toxic_words=str(path)))
    for content, message in ((b"", "has no words"), (b"# none\n \n", "has no words"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Filters(FilterConfig(toxic_words=str(path)))


NO_NUMBERS: list[Any] = [None, math.nan, math.inf, "", "nan", "high", [], {}, True, 10**400]
LIMITS: dict[str, Any] = {"punsafe": 0.1, "pwatermark": 0.5, "min_side": 64, "max_aspect": 2.0, "similarity": 0.3}
KEYS = {"min_side": "original_width", "max_aspect": "original_width"}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_no_number_is_missing(name: str) -> None:
    limits, key = {name: LIMITS[name]}, KEYS.get(name, name)
    rest = {k: v for k, v in META.items() if k not in (key, "width")}
    for meta in (rest, *({**rest, key: value} for value in NO_NUMBERS)):
        assert reason(meta, **limits, missing="keep") is None
        assert reason(meta, **limits, missing="drop") == f"{name} is missing"
        with pytest.raises(MissingKeyError):
            reason(meta, **limits)


def test_numbers_in_text_are_numbers() -> None:
    assert reason({"punsafe": "0.3"}, punsafe=0.2) == "punsafe" and reason({"punsafe": " 3e-1 "}, punsafe=0.3) is None
    assert reason({"width": "640", "height": "480.0"}, min_side=481) == "min_side"


def test_a_missing_key_is_told_in_one_sentence_for_people() -> None:
    with pytest.raises(MissingKeyError) as caught:
        reason({"url": "x", "caption": "a cat"}, pwatermark=0.5)
    message = str(caught.value)
    for part in ("pwatermark", "caption, url", "missing=keep", "drop"):
        assert part in message
    assert message[0] == "T" and message[-1] == "." and "\n" not in message
    with pytest.raises(MissingKeyError, match="LANGUAGE .*none"):
        reason({}, languages=["en"])


def test_a_kept_sample_that_lacks_a_key_still_meets_the_other_filters() -> None:
    assert reason({"pwatermark": 0.9}, punsafe=0.1, pwatermark=0.5, missing="keep") == "pwatermark"


def test_the_case_of_keys_does_not_matter_but_the_exact_one_comes_first() -> None:
    for key in ("punsafe", "PUNSAFE", "Punsafe"):
        assert reason({key: 0.9}, punsafe=0.5) == "punsafe"
    for meta in ({"PUNSAFE": 0.9, "punsafe": 0.1}, {"punsafe": 0.1, "PUNSAFE": 0.9}):
        assert reason(meta, punsafe=0.5) is None
    assert reason({"punsafe": None, "PUNSAFE": 0.9}, punsafe=0.5) == "punsafe"
    assert reason({"WIDTH": 100, "HEIGHT": 200}, min_side=101) == "min_side"


def all_on(tmp_path: Path) -> FilterConfig:
    (tmp_path / "words.txt").write_text("bad")
    return FilterConfig(toxic_words=str(tmp_path / "words.txt"), languages=["en"], **LIMITS)


def test_the_first_filter_gives_the_reason(tmp_path: Path) -> None:
    filters = Filters(all_on(tmp_path))
    assert filters.active == [
        "punsafe", "pwatermark", "toxic_words", "min_side", "max_aspect", "similarity", "languages"
    ]  # fmt: skip
    good: dict[str, Any] = {"punsafe": 0, "pwatermark": 0, "width": 64, "height": 64, "similarity": 1, "LANGUAGE": "en"}
    bad: dict[str, Any] = {"punsafe": 1, "pwatermark": 1, "width": 9, "height": 999, "similarity": 0, "LANGUAGE": "fr"}
    assert filters.reason(good, "good") is None
    # Each is made good in turn; min_side first, then max_aspect.
    mended = [{}, {"punsafe": 0}, {"pwatermark": 0}, {}, {"width": 64}, {"height": 64}, {"similarity": 1}]
    meta = bad
    for i, (name, change) in enumerate(zip(filters.active, mended, strict=True)):
        meta = {**meta, **change}
        assert filters.reason(meta, "bad" if i < 3 else "good") == name


def test_filters_reach_worker_processes(tmp_path: Path) -> None:
    filters = Filters(all_on(tmp_path))
    copy = pickle.loads(pickle.dumps(filters))
    assert copy.active == filters.active
    assert copy.reason(META, "a bad cat") == filters.reason(META, "a bad cat") == "toxic_words"
    assert copy.reason(META, "a cat") is filters.reason(META, "a cat") is None


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"missing": "ignore"}, "error, keep, drop"),
        ({"punsafe": -0.1}, "punsafe is -0.1"),
        ({"punsafe": math.nan}, "from 0 to 1"),
        ({"pwatermark": 50.0}, "pwatermark is 50"),
        ({"similarity": 1.5}, "from -1 to 1"),
        ({"min_side": -1}, "min_side is -1"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"max_aspect": math.nan}, "max_aspect is nan"),
        ({"languages": ["en", ""]}, "'' in languages"),
        ({"languages": ["False"]}, "'no'"),  # what is left of [no]
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filters(FilterConfig(**limits))


def test_the_config_is_of_plain_types() -> None:
    page = OmegaConf.create("{punsafe: 0.1, languages: [en, de], missing: keep}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(FilterConfig), page))
    assert isinstance(config, FilterConfig) and config == FilterConfig(
        punsafe=0.1, languages=["en", "de"], missing="keep"
    )
    assert Filters(config).active == ["punsafe", "languages"]


def test_pictures_are_chosen_by_any_key_of_their_metadata(tmp_path: Path) -> None:
    """Concepts held out, and a narrower set: the values of a key that are kept, and a list of those dropped."""
    (tmp_path / "held_out.txt").write_text("# never trained on\n1f680  # rocket\n\n1f98a\n", encoding="utf-8")
    limits: dict[str, Any] = {
        "only": {"group": ["animals", "travel"]},
        "within": {"hexcode": tmp_path / "learnt.txt"},
        "without": {"hexcode": tmp_path / "held_out.txt"},
    }
    (tmp_path / "learnt.txt").write_text("1f431  # cat\n1f680\n1f98a\n", encoding="utf-8")
    assert Filters(FilterConfig(**limits)).active == ["only group", "within hexcode", "without hexcode"]
    assert reason({"group": "animals", "hexcode": "1f431"}, **limits) is None
    assert reason({"group": "flags", "hexcode": "1f431"}, **limits) == "only group"
    assert reason({"group": "travel", "hexcode": "1f680"}, **limits) == "without hexcode"
    assert reason({"group": "animals", "hexcode": "1f98a"}, **limits) == "without hexcode"
    assert reason({"group": "animals", "hexcode": "1f42d"}, **limits) == "within hexcode"
    with pytest.raises(MissingKeyError, match="within hexcode needs a hexcode"):
        reason({"group": "animals"}, **limits)
    with pytest.raises(MissingKeyError, match="only group needs a group"):
        reason({"hexcode": "1f431"}, **limits)


def test_a_list_of_names_that_is_none_ends_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no list of names"):
        reason({}, without={"key": str(tmp_path / "nowhere.txt")})
    with pytest.raises(FileNotFoundError, match="no list of names"):
        reason({}, within={"key": str(tmp_path / "nowhere.txt")})
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no names"):
        reason({}, without={"key": str(tmp_path / "empty.txt")})
