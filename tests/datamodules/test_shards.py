"""The order of samples is pure, complete and split exactly; what cannot be loaded is replaced and counted."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule, image_text, shards
from datamodules.shards import Collate, Mixture, Order, Positions, Stream, permutation
from datamodules.tars import expand, index, scan

from .conftest import jpeg


class Numbers:
    """Samples 0..n-1, of which `bad` cannot be loaded."""

    def __init__(self, n: int, bad: tuple[int, ...] = ()) -> None:
        self.n, self.bad = n, bad

    def __len__(self) -> int:
        return self.n

    def name(self, index: int) -> str:
        return f"numbers:{index}"

    def load(self, index: int, position: int, rng: np.random.Generator) -> dict[str, Any]:
        if index in self.bad:
            raise ValueError("the number is bad")
        return {"x": torch.tensor(index), "draw": torch.tensor(rng.random()), "key": str(index)}


@pytest.mark.parametrize("n", [1, 7, 128])
def test_an_epoch_holds_every_sample_once(n: int) -> None:
    for epoch in range(3):
        assert sorted(permutation(3, epoch, n)) == list(range(n))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = permutation(0, 0, 100).copy()
    permutation.cache_clear()
    assert (permutation(0, 0, 100) == first).all()
    assert (permutation(0, 1, 100) != first).any()
    assert (permutation(1, 0, 100) != first).any()


SIZES = [5, 1, 0, 30, 7, 7, 2, 11]


@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 50])
def test_an_epoch_in_windows_of_shards_holds_every_sample_once(window: int) -> None:
    n, order = sum(SIZES), Order(4, SIZES, window)
    epochs = [[order(epoch * n + i) for i in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Order(4, SIZES, window)
    assert [again(p) for p in reversed(range(3 * n))] == [i for epoch in epochs for i in epoch][::-1]
    assert [Order(5, SIZES, window)(p) for p in range(n)] != epochs[0]


def test_a_window_keeps_few_shards_open() -> None:
    sizes = [20] * 12
    order = Order(0, sizes, 3)
    shards = [order(p) // 20 for p in range(240)]
    for start in range(0, 240, 60):
        assert len(set(shards[start : start + 60])) == 3  # a group of shards at a time
        assert len(set(shards[start : start + 10])) > 1  # and shuffled within
    assert [order(p) // 20 for p in range(240, 480)] != shards


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 1, 1]])
def test_a_mixture_has_its_weights_and_loses_nothing(weights: list[float]) -> None:
    mixture = Mixture(2, weights)
    drawn = [mixture(p) for p in range(5000)]
    for source, weight in enumerate(weights):
        positions = [within for s, within in drawn if s == source]
        assert len(positions) / 5000 == pytest.approx(weight / sum(weights), abs=1e-3)
        assert sorted(positions) == list(range(len(positions)))
        share = [s for s, _ in drawn[:300]].count(source) / 300  # mixed, not one after the other
        assert share == pytest.approx(weight / sum(weights), abs=0.1)
    assert [Mixture(2, weights)(p) for p in range(4999, -1, -1)] == drawn[::-1]


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, 1e-5]])
def test_weights_that_cannot_be_met_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(0, weights)


def test_a_stream_of_two_sources() -> None:
    stream = Stream([Numbers(10), Numbers(1000)], seed=0, weights=[1, 1])
    keys = [int(stream[p]["key"]) for p in range(200)]
    small = [key for key in keys if key < 10]
    assert 80 < len(small) < 125 and len(set(small)) == 10  # ten epochs of the small one
    assert len({key for key in keys if key >= 10}) > 80


def test_a_sample_is_a_pure_function_of_its_position() -> None:
    stream, again = Stream(Numbers(10), seed=5), Stream(Numbers(10), seed=5)
    forward = [stream[i]["draw"].item() for i in range(25)]
    backward = [again[i]["draw"].item() for i in reversed(range(25))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 25  # a sample is drawn anew in each epoch


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_partition_the_positions_in_every_step(world: int) -> None:
    ranks = [list(islice(Positions(40, 4, rank, world), 5)) for rank in range(world)]
    for step in range(5):
        together = [position for rank in ranks for position in rank[step]]
        assert together == list(range(40 + step * world * 4, 40 + (step + 1) * world * 4))


def test_the_batches_have_no_length() -> None:
    with pytest.raises(TypeError):
        len(Positions(0, 4))  # type: ignore[arg-type]


def test_a_bad_sample_is_replaced_by_the_next_and_reported() -> None:
    clean, stream = Stream(Numbers(10), seed=0), Stream(Numbers(10, bad=(3,)), seed=0)
    position = [clean.locate(p)[1] for p in range(10)].index(3)
    sample = stream[position]
    assert sample["key"] == clean[position + 1]["key"]
    assert sample["skipped"] == [("numbers:3", "the number is bad")]
    batch = Collate()([stream[p] for p in range(10)])
    assert batch["x"].shape == (10,) and isinstance(batch["key"], list)
    assert batch["skipped"] == [("numbers:3", "the number is bad")]


def test_too_many_bad_samples_in_a_row_end_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"48 samples in a row .*the number is bad.*numbers:"):
        Stream(Numbers(5, bad=tuple(range(5))), seed=0)[0]


class Shards(Numbers):
    """Numbers in shards of 40."""

    @property
    def sizes(self) -> list[int]:
        return [40] * (self.n // 40)


@pytest.mark.parametrize("window", [0, 1])
def test_a_lost_shard_is_replaced_by_others_and_counts_once(window: int) -> None:
    """A shard lost whole is no reason to stop where the share that may be corrupt is higher."""
    lost = tuple(range(80, 120))
    stream = Stream(Shards(400, bad=lost), seed=0, max_skipped=0.2, window=window)
    samples = [stream[p] for p in range(400)]
    failures = [failure for sample in samples for failure in sample["skipped"]]
    assert sorted(failures) == sorted((f"numbers:{i}", "the number is bad") for i in lost)
    assert {int(sample["key"]) for sample in samples} == set(range(400)) - set(lost)
    replacements = [int(sample["key"]) for sample in samples if sample["skipped"]]
    assert len(set(replacements)) > 25  # not one neighbour again and again
    if window:
        assert len({i // 40 for i in replacements}) <= 4  # a shard that is opened for one of them serves the others
    again = Stream(Shards(400, bad=lost), seed=0, max_skipped=0.2, window=window)
    assert [again[p]["key"] for p in reversed(range(400))] == [sample["key"] for sample in reversed(samples)]


def test_of_two_sources_one_may_be_lost() -> None:
    stream = Stream([Numbers(50), Numbers(50, bad=tuple(range(50)))], seed=0, weights=[1, 1])
    assert sum(bool(stream[p]["skipped"]) for p in range(1000)) == 500


def test_wrong_ranks_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="Rank 2"):
        Positions(0, 4, rank=2, world=2)
    with pytest.raises(ValueError, match="batch size"):
        Positions(0, 0)


def test_shards_are_found_by_range_glob_and_folder(tmp_path: Path, make_shard: Any) -> None:
    paths = [str(make_shard(tmp_path / f"{i:05d}.tar", 1, first=i)) for i in range(3)]
    assert expand(str(tmp_path / "{00000..00002}.tar")) == paths
    assert expand([str(tmp_path / "*.tar")]) == paths
    assert expand(str(tmp_path)) == paths
    with pytest.raises(FileNotFoundError, match="00003.tar; give a .tar file"):
        expand(str(tmp_path / "{00000..00003}.tar"))


def test_the_index_finds_the_bytes(tmp_path: Path, make_shard: Any) -> None:
    entries, problems = index([str(make_shard(tmp_path / "a.tar", 3))], [["jpg"], ["txt"]])
    assert [entry.read("txt") for entry in entries] == [b"caption 0", b"caption 1", b"caption 2"]
    assert not problems


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77, 0.9])
def test_what_a_truncated_shard_still_holds_is_kept(tmp_path: Path, make_shard: Any, share: float) -> None:
    path = make_shard(tmp_path / "a.tar", 20)
    whole, _ = index([str(path)], [["jpg"], ["txt", "json"]])
    data = path.read_bytes()
    end = max(sum(span) for span in whole[-1].members.values())
    path.write_bytes(data[: int(end * share)])
    kept, problems = index([str(path)], [["jpg"], ["txt", "json"]])
    assert 0 < len(kept) < 20
    assert [entry.read("jpg") for entry in kept] == [whole[i].read("jpg") for i in range(len(kept))]
    assert any("truncated" in cause for _, cause in problems)


def test_shards_that_are_no_tars_are_reported_and_nothing_at_all_is_an_error(tmp_path: Path, make_shard: Any) -> None:
    good = str(make_shard(tmp_path / "good.tar", 2))
    empty, junk = tmp_path / "empty.tar", tmp_path / "junk.tar"
    empty.write_bytes(b"")
    junk.write_bytes(b"no tar" * 500)
    assert scan(str(empty)) == ({}, "the shard is empty")
    entries, problems = index([str(empty), good, str(junk)], [["jpg"]])
    assert len(entries) == 2 and len(problems) == 2
    with pytest.raises(ValueError, match="No sample could be read from .*empty.tar.*expected are"):
        index([str(empty), str(junk)], [["jpg"]])


def test_a_sample_that_lacks_its_picture_is_left_out(tmp_path: Path, make_shard: Any) -> None:
    path = str(make_shard(tmp_path / "a.tar", 2))
    with pytest.raises(ValueError, match="KEY.mp4"):
        index([path], [["mp4"]])


@pytest.mark.parametrize("dead, stops", [(9, True), (5, False)])
def test_a_run_does_not_start_where_most_shards_are_lost(
    tmp_path: Path, make_shard: Any, dead: int, stops: bool
) -> None:
    for i in range(10):
        make_shard(tmp_path / f"{i}.tar", 2, first=2 * i)
    for i in range(dead):
        (tmp_path / f"{i}.tar").write_bytes(b"")
    data = ImageTextDataModule(str(tmp_path), 2, 8)
    if stops:
        with pytest.raises(ValueError, match=r"9 of 10 shards .*max_skipped=0.5.*9 times: the shard is empty .*tar"):
            data.setup()
        data = ImageTextDataModule(str(tmp_path), 2, 8, max_skipped=0.9)
    data.setup()
    assert len(data.sources()[0]) == 2 * (10 - dead) and data.skipped["the shard is empty"] == dead


def test_a_run_does_not_start_where_most_samples_listed_are_lost(tmp_path: Path, make_v2d: Any) -> None:
    def lost(name: str, data: Any) -> None:
        with pytest.raises(ValueError, match=rf"3 of 5 listed samples .*data.max_skipped=0.5.*{name}"):
            data.setup()

    (tmp_path / "list.csv").write_text("filename,caption\na.jpg,x\nb.jpg,x\n1.jpg,x\n2.jpg,x\n3.jpg,x\n")
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(0, (8, 8)))
    lost("list.csv:1.jpg", ImageTextDataModule(str(tmp_path), 2, 8))
    (tmp_path / "clips").mkdir()
    failed = {str(i): {"json": {"status": "failed_to_download"}} for i in range(3)}
    make_v2d(tmp_path / "clips" / "0.tar", failed | {f"{i}": {"mp4": b"", "json": {}} for i in (3, 4)})
    lost("video2dataset: failed_to_download", VideoDataModule(tmp_path / "clips", 2, 2, 8, curriculum=Curriculum(1)))
    for i in (1, 2):
        (tmp_path / "clips" / f"{i}.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="2 of 3 shards .*not an uncompressed tar"):
        VideoDataModule(tmp_path / "clips", 2, 2, 8, curriculum=Curriculum(1)).setup()


@pytest.mark.parametrize("window", [0, 1])
def test_a_resume_does_not_decode_what_it_skips(
    tmp_path: Path, make_shard: Any, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    for i in range(2):
        make_shard(tmp_path / f"{i}.tar", 50, first=50 * i)
    decode, decoded = image_text.decode, list[int]()
    monkeypatch.setattr(image_text, "decode", lambda *args: decoded.append(1) or decode(*args))
    data = ImageTextDataModule(str(tmp_path), 4, 8, window=window)
    data.load_state_dict({"consumed": 10**7 + 60})  # deep in an epoch
    assert len(next(iter(data.train_dataloader()))["key"]) == len(decoded) == 4


def test_a_worker_that_hangs_ends_the_run_and_names_the_file(
    tmp_path: Path, make_shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard(tmp_path / "0.tar", 20, broken={7: {"jpg": b"hang"}})
    decode = image_text.decode
    monkeypatch.setattr(image_text, "decode", lambda *args: time.sleep(60) if args[0] == b"hang" else decode(*args))
    monkeypatch.setattr(shards, "TIMEOUT", 3)
    data = ImageTextDataModule(str(tmp_path), 2, 8, workers=2)
    with pytest.raises(RuntimeError, match="no batch for .* they were reading [^,]*0.tar:000000007. A decoder"):
        for _ in islice(data.train_dataloader(), 10):
            pass


def keys(data: ImageTextDataModule) -> list[str]:
    return [key for batch in islice(iter(data.train_dataloader()), 2) for key in batch["key"]]


def test_other_samples_than_in_the_checkpoint_are_refused(tmp_path: Path, make_shard: Any) -> None:
    for folder in ("a", "moved"):
        for i in range(2):
            (tmp_path / folder).mkdir(exist_ok=True)
            make_shard(tmp_path / folder / f"{i}.tar", 10, first=10 * i)

    def resume(folder: str, **options: Any) -> list[str]:
        data = ImageTextDataModule(str(tmp_path / folder), 5, 8, **options)
        data.load_state_dict(state)
        return keys(data)

    before = ImageTextDataModule(str(tmp_path / "a"), 5, 8)
    first = keys(before)
    state = {**before.state_dict(), "consumed": 10}
    assert sorted(first + resume("moved", workers=1)) == [f"{i:09d}" for i in range(20)]
    for options in ({"seed": 1}, {"window": 1}):
        with pytest.raises(ValueError, match="20 samples found, or their order, are not those of the checkpoint"):
            resume("a", **options)
    make_shard(tmp_path / "a" / "1.tar", 10, first=11)  # as many, and others
    with pytest.raises(ValueError, match="20 samples found"):
        resume("a")
    (tmp_path / "a" / "1.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="10 samples found, .*set data.changed=true"):
        resume("a")
    assert len(resume("a", changed=True)) == 10
