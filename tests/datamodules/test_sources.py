"""Where captioned stills come from: mixtures, filters on their metadata, plain folders; and when a run gives up."""

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from datamodules import ImageTextDataModule
from datamodules.filters import FilterConfig

from .conftest import jpeg


def keys(module: Any, n: int) -> list[str]:
    found = []
    for batch in islice(iter(module.train_dataloader()), n):
        found += module.on_before_batch_transfer(batch, 0)["key"]
    return found


@pytest.fixture
def rated(tmp_path: Path, make_shard: Any) -> Path:
    """A shard of 20 with punsafe = i / 20 in the json of all but the last, which is no json."""
    metas: dict[int, dict[str, bytes]] = {
        i: {"json": json.dumps({"caption": f"caption {i}", "punsafe": i / 20}).encode()} for i in range(19)
    }
    metas[19] = {"json": b"{broken"}
    return make_shard(tmp_path / "rated.tar", 20, broken=metas)


def test_filters_leave_no_holes_in_the_order(rated: Path) -> None:
    data = ImageTextDataModule(str(rated), 4, 16, filters=FilterConfig(punsafe=0.5), workers=2)
    seen = keys(data, 3)
    assert {int(key) for key in seen} == set(range(11)) and len(seen) == 12  # the broken one's neighbour is there twice
    assert data.filtered == {"punsafe": 8}
    assert data.skipped == {"the json is not valid JSON": 1}


def test_filters_that_take_everything_say_so(rated: Path, make_shard: Any, tmp_path: Path) -> None:
    clean = make_shard(tmp_path / "clean.tar", 5)
    with pytest.raises(ValueError, match=r"punsafe.*(caption|alt_captions).*missing=keep"):
        ImageTextDataModule(str(clean), 4, 16, filters=FilterConfig(punsafe=0.5)).setup()
    with pytest.raises(ValueError, match="took every sample"):
        ImageTextDataModule(str(clean), 4, 16, filters=FilterConfig(punsafe=0.5, missing="drop")).setup()
    kept = ImageTextDataModule(str(clean), 4, 16, filters=FilterConfig(punsafe=0.5, missing="keep"))
    assert len(kept.sources()[0]) == 5


def test_sources_are_mixed_by_weight(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 10)
    make_shard(tmp_path / "b.tar", 10, first=100)
    shards = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    seen = keys(ImageTextDataModule(shards, 10, 16, weights=[9, 1]), 30)
    assert sum(int(key) < 100 for key in seen) == pytest.approx(270, abs=12)
    with pytest.raises(ValueError, match="1 weights of 2 sources"):
        ImageTextDataModule(shards, 10, 16, weights=[1])


@pytest.mark.parametrize("columns", [("filename", "caption"), ("Path", "TEXT")])
def test_a_plain_folder_with_a_csv(tmp_path: Path, columns: tuple[str, str]) -> None:
    (tmp_path / "pictures").mkdir()
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*columns, "punsafe"])
        for i in range(6):
            (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i, (40, 30)))
            rows.writerow([f"pictures/{i}.jpg", f"caption {i}", i / 10])
        rows.writerow(["pictures/gone.jpg", "nothing", 0])
    data = ImageTextDataModule(str(tmp_path), 5, 16, filters=FilterConfig(punsafe=0.45))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (5, 3, 16, 16)
    assert sorted(batch["key"]) == [f"pictures/{i}.jpg" for i in range(5)]
    assert {text.split()[1] for text in batch["text"]} == set("01234")
    assert data.skipped == {"the file is missing or of another kind": 1} and data.filtered == {"punsafe": 1}
    (tmp_path / "list.csv").write_text("name,words\n1,2\n")
    with pytest.raises(ValueError, match="columns name, words; needed are"):
        ImageTextDataModule(str(tmp_path), 5, 16).setup()


def test_damaged_rows_of_a_csv_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0, (8, 8)))
    rows = [
        "filename,caption,punsafe",
        "a.jpg,a cat, sitting,0.1",
        "a.jpg,short",
        "a.jpg,a cat,0.1",
        f"{'a' * 5000}.jpg,,",
    ]
    rows += ["a\0b.jpg,x,0", 'a.jpg,"a stray quote ' + "x" * 140_000]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    for filters in (FilterConfig(), FilterConfig(punsafe=0.5, missing="keep")):
        data = ImageTextDataModule(str(tmp_path), 4, 8, filters=filters, max_skipped=0.7)
        assert [entry.meta["caption"] for entry in data.sources()[0].entries if entry.meta] == ["short", "a cat"]
        assert data.skipped == {"the row of the CSV is damaged": 2, "the file is missing or of another kind": 2}
    (tmp_path / "list.csv").write_text("x" * 140_000 + "\na.jpg,x\n")
    with pytest.raises(ValueError, match="columns of no name"):
        ImageTextDataModule(str(tmp_path), 4, 8).setup()


def test_a_csv_has_no_embeddings(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0, (8, 8)))
    (tmp_path / "list.csv").write_text("filename,caption\na.jpg,a cat\n")
    with pytest.raises(ValueError, match="listed in a CSV file, and embeddings"):
        ImageTextDataModule(str(tmp_path), 4, 8, clip="a clip").setup()


def test_a_sample_that_lacks_a_key_is_named(rated: Path) -> None:
    with pytest.raises(ValueError, match=r"rated.tar:000000000: The filter pwatermark needs"):
        ImageTextDataModule(str(rated), 4, 16, filters=FilterConfig(pwatermark=0.5)).setup()


def test_half_a_surrogate_does_not_reach_the_tokenizer(tmp_path: Path, make_shard: Any) -> None:
    meta = json.dumps({"caption": "a \ud800 cat", "alt_captions": ["a \udfff dog"]}).encode()
    make_shard(tmp_path / "a.tar", 1, broken={0: {"json": meta}})
    (batch,) = islice(iter(ImageTextDataModule(str(tmp_path), 20, 8).train_dataloader()), 1)
    assert {text.encode() for text in batch["text"]} == {b"a ? cat", b"a ? dog"}


def test_a_run_stops_when_most_samples_are_bad(tmp_path: Path, make_shard: Any) -> None:
    broken = {i: {"jpg": b"no picture"} for i in range(12)}
    make_shard(tmp_path / "a.tar", 20, broken=broken)
    with pytest.raises(RuntimeError, match=r"more than data.max_skipped=0.5 allows. \d+ times: .*a.tar:0000000"):
        keys(ImageTextDataModule(str(tmp_path), 20, 16), 100)
    fine = ImageTextDataModule(str(tmp_path), 20, 16, max_skipped=0.9)
    assert len(keys(fine, 100)) == 2000
