"""Memory is computed as it is, work as torch counts it, and the pages fit the GPUs that they are meant for."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import build
from experiments.config import load
from experiments.memory import GIB, bounds, inputs, measured, size, step


@pytest.mark.parametrize(
    "stage, precision, batch",
    [
        ("clip", "32-true", 32),
        ("prior", "bf16-mixed", 16),
        ("decoder", "32-true", 5),
        ("sr_high", "bf16-mixed", 4),
        ("interpolation", "bf16-mixed", 1),
    ],
)
def test_what_is_computed_is_what_a_real_step_takes(stage: str, precision: str, batch: int) -> None:
    """With AdamW, averages and CLIP; at other batches than are traced. `small`: make plan SIZE=small ARGS=measure=1."""
    config = load("tiny", [f"trainer.precision={precision}"], section=stage)
    assert step(config, stage, "cpu").parts(batch).peak == pytest.approx(measured(config, stage, batch, "cpu"), rel=0.1)


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_a_batch_that_was_not_traced_is_exact(stage: str) -> None:
    """The peak moves from the end of backward to its start as batches grow; two traces tell where."""
    config = load("tiny")
    both = step(config, stage)
    for batch in (3, 20):
        alone = step(config, stage, batch=batch).parts(batch)
        assert both.parts(batch).activations == alone.activations
        assert both.parts(batch).peak == alone.peak


@pytest.mark.parametrize("stage", ["prior", "sr_low"])
def test_work_is_what_torch_counts(stage: str) -> None:
    """But for attention, in whose backward a GPU computes the weights again."""
    config = load("tiny")
    net = build.network(config, stage)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(**inputs(config, stage, net, 2)).square().mean().backward()
    assert step(config, stage).flops == pytest.approx(
        counter.get_total_flops() / 2, rel=0 if stage == "sr_low" else 0.05
    )


def test_parts_by_strategy() -> None:
    config = load("tiny")
    net = build.network(config, "decoder")
    traced = step(config, "decoder")
    one, ddp, fsdp = (traced.parts(8, strategy, 8) for strategy in ("one GPU", "DDP", "FSDP2"))
    assert one.weights == one.gradients == one.ema == one.adamw / 2 == 4 * size(net)
    assert (ddp.gradients, ddp.peak) == (2 * one.gradients, one.peak + one.gradients)
    assert fsdp.weights == one.weights / 8 and fsdp.adamw == one.adamw / 8
    assert fsdp.activations == one.activations and fsdp.clip == one.clip > 0
    assert fsdp.peak < one.peak - 7 / 8 * (one.weights + one.adamw + one.ema) + fsdp.copies
    held = traced.parts(8, accumulate=2)
    assert one.peak <= held.peak <= one.peak + one.gradients


def test_frozen_layers_and_recomputation_take_less() -> None:
    free = step(load("tiny", ["freeze_spatial=false"], "decoder_video"), "decoder_video", batch=2)
    frozen = step(load("tiny"), "decoder_video", batch=2)
    assert frozen.trained < free.trained == frozen.parameters
    assert frozen.parts(2).adamw == 8 * frozen.trained
    lean = step(
        load("tiny", ["freeze_spatial=false", "decoder.unet.checkpoint_activations=true"], "decoder_video"),
        "decoder_video",
    )
    assert lean.parts(2).activations < 0.6 * free.parts(2).activations
    assert 1.2 * free.flops < lean.flops < 1.4 * free.flops


def test_the_largest_batch_is_the_largest() -> None:
    traced = step(load("tiny"), "sr_low")
    largest = traced.largest_batch(GIB)
    assert traced.parts(largest).peak <= GIB < traced.parts(largest + 1).peak
    assert traced.largest_batch(0.01 * GIB) == 0


@pytest.mark.parametrize("stage", ["prior", "sr_high_video"])
def test_what_is_sure_without_a_trace(stage: str) -> None:
    config = load("tiny")
    traced = step(config, stage)
    least, most = bounds(config, stage, "one GPU", 1)
    assert least <= traced.parts(config.decoder.trainer.batch_size).peak
    assert traced.parts(build.section(config, stage).trainer.batch_size).peak <= most


@pytest.mark.parametrize(
    "page, stage, limit",
    [("small", "decoder", 18), ("base", "decoder_video", 47)],
)
def test_the_readmes_limits_hold(page: str, stage: str, limit: int) -> None:
    config = load(page)
    parts = step(config, stage, batch=build.section(config, stage).trainer.batch_size).parts(
        build.section(config, stage).trainer.batch_size
    )
    assert 0.3 * limit < (parts.peak - parts.clip) / GIB < limit


def test_the_memory_of_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU the computed peak is held to the allocator's."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    for stage in ("decoder", "decoder_video", "sr_low", "prior"):
        config = load("base", ["data.embeddings=true"])
        found = measured(config, stage, 4, "cuda")
        assert step(config, stage).parts(4).peak == pytest.approx(found, rel=0.1), stage
