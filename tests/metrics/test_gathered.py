"""Two processes give the numbers, the intervals and the summaries of one."""

import multiprocessing
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from lightning_modules.metrics import (
    CLIPSIM,
    CLIPFrechetDistance,
    FrechetVideoDistance,
    KernelVideoDistance,
    VideoInceptionScore,
    i3d,
    inception_score,
)
from tests.conftest import free_port

REAL, FAKE = 7, 8


class Encoder:
    name = "blocks"

    def image_features(self, images):
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def encode_image(self, images):
        return F.normalize(self.image_features(images), dim=1)

    def encode_text(self, captions):
        return F.normalize(torch.stack([torch.arange(12.0) % (2 + len(c)) for c in captions]), dim=1)


class Means(torch.nn.Module):
    """Cheap features or logits of a clip: `width` block means."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x):
        return F.adaptive_avg_pool3d(x, [4, 6, 6]).flatten(1)[:, : self.width]


def clips(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(1, 256, (n, 1, 1, 1, 1), generator=generator)
    return (torch.rand(n, 3, 16, 8, 8, generator=generator) * levels).byte()


def scores(real: list[int], fake: list[int]) -> dict[str, Any]:
    """Of each metric, over these clips: value, interval, summary. Real clips in two updates, if there are any."""
    all_real, all_fake = clips(REAL, 0), clips(FAKE, 1)
    captions = ["a" * (i % 5) for i in range(FAKE)]
    found = {}
    metrics = [FrechetVideoDistance(), KernelVideoDistance(), CLIPFrechetDistance(Encoder())]
    metrics += [VideoInceptionScore(splits=2), CLIPSIM(Encoder())]
    for metric in metrics:
        if metric.kinds == ("real", "fake"):
            for part in (real[:1], real[1:]):
                if part:
                    metric.update(all_real[part], real=True)
            if fake:
                metric.update(all_fake[fake], real=False)
        elif fake:
            metric.update(all_fake[fake], *([[captions[i] for i in fake]] if isinstance(metric, CLIPSIM) else []))
        value = metric.compute().item()
        n = int(metric.n_fake)
        found[metric.name] = (value, metric.interval(resamples=50), metric.summary())
        assert int(metric.n_fake) == n == len(fake)  # and the rank has its own clips back
    return found


def rank(number: int, port: int, jobs: Any) -> None:
    i3d.random_i3d = lambda: Means(400)
    i3d.fold_batch_norm = lambda net: net
    inception_score.random_c3d = lambda: Means(101)
    if port:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    while job := jobs.recv():
        try:
            jobs.send(scores(*job))
        except BaseException:
            jobs.send(traceback.format_exc())


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_modules.metrics"])
    port = free_port()
    started = []
    for number, where in ((0, port), (1, port), (0, 0)):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank, args=(number, where, theirs), daemon=True)
        process.start()
        started.append((ours, process))

    def do(*jobs):
        for (pipe, _), job in zip(started, jobs, strict=True):
            pipe.send(job)
        return [pipe.recv() if pipe.poll(60) else "a process hangs" for pipe, _ in started]

    yield do
    for pipe, _ in started:
        pipe.send(None)
    for _, process in started:
        process.join(5)
        process.kill()


@pytest.mark.parametrize(
    "real, fake",
    [(([0, 2, 4], [1, 3, 5, 6]), ([5, 0, 1], [2, 7, 3, 4, 6])), (([], list(range(7))), ([], list(range(8))))],
)
def test_two_processes_score_as_one(processes, real, fake):
    """Also where one of them has nothing of its own."""
    one = (list(range(REAL)), list(range(FAKE)))
    first, second, whole = processes((real[0], fake[0]), (real[1], fake[1]), one)
    assert isinstance(first, dict) and isinstance(second, dict) and isinstance(whole, dict), (first, second, whole)
    assert list(whole) == ["fvd_random", "kvd_random", "clip_fid", "is_random", "clipsim"]
    for name, (value, interval, summary) in whole.items():
        for found in (first, second):
            assert found[name][0] == pytest.approx(value, rel=1e-5), name
            assert found[name][1] == pytest.approx(interval, rel=1e-4), name
            deviation = found[name][2].pop("deviation", None)
            assert deviation is None or deviation == pytest.approx(summary["deviation"], rel=1e-3)
            assert found[name][2] == {k: v for k, v in summary.items() if k != "deviation"}
