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


def test_a_run_stops_when_most_samples_are_bad(tmp_path: Path, make_shard: Any) -> None:
    broken = {i: {"jpg": b"no picture"} for i in range(12)}
    make_shard(tmp_path / "a.tar", 20, broken=broken)
    with pytest.raises(RuntimeError, match=r"more than data.max_skipped=0.5 allows. \d+ times: .*a.tar:0000000"):
        keys(ImageTextDataModule(str(tmp_path), 20, 16), 100)
    fine = ImageTextDataModule(str(tmp_path), 20, 16, max_skipped=0.9)
    assert len(keys(fine, 100)) == 2000
