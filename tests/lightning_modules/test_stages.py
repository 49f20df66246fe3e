"""A few steps of every stage: what reaches the network, what trains, and that a restart changes nothing."""

import copy

import lightning as L
import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from lightning_modules.callbacks import EMA, ClipGradients, StepSeed
from lightning_modules.clip import ClipModule
from lightning_modules.decoder import DecoderModule, resized
from lightning_modules.interpolation import InterpolationModule, random_masks
from lightning_modules.optim import OptimConfig, optimizers
from lightning_modules.prior import PriorModule
from lightning_modules.super_resolution import SuperResolutionModule
from models.clip import scaled
from models.diffusion import Diffusion, DiffusionConfig, gaussian_blur
from models.prior import Prior, PriorConfig

FAST = OptimConfig(lr=1e-2)
FRAMES, SIDE = 7, 8
PROCESS = Diffusion(DiffusionConfig())


def image_batch(n=3, side=SIDE):
    return {"image": torch.randint(256, (n, 3, side, side), dtype=torch.uint8), "text": ["a fox", "a car", "a cup"][:n]}


def video_batch(n=2, frames=FRAMES, side=SIDE):
    video = torch.randint(256, (n, 3, frames, side, side), dtype=torch.uint8)
    return {"video": video, "fps": torch.tensor([4.0, 23.976])[:n]}


def smooth_batch(n=2, frames=3, side=16):
    """Clips without detail, which survive being made small."""
    small = torch.rand(n * frames, 3, 2, 2) * 255
    rows = F.interpolate(small, (side, side), mode="bilinear", align_corners=True).to(torch.uint8)
    return {"video": rearrange(rows, "(b f) c h w -> b c f h w", f=frames), "fps": torch.full((n,), 8.0)}


class Spy:
    """What the network was called with, and what it gave."""

    def __init__(self, net: nn.Module):
        self.calls: list[tuple[tuple, dict]] = []
        net.register_forward_hook(self, with_kwargs=True)

    def __call__(self, net, args, kwargs, output):
        self.calls.append((args, {k: v for k, v in kwargs.items()}))


class Untouchable(dict):
    """A batch whose caption must not be read, nor looked for."""

    def refuse(self, key):
        if key == "text":
            raise AssertionError("a video stage looked at a caption")

    def __getitem__(self, key):
        self.refuse(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.refuse(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.refuse(key)
        return super().__contains__(key)

    def values(self):
        raise AssertionError("a video stage looked at every value of the batch")

    items = values


def copied(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def moved(net, before):
    assert all(v.isfinite().all() for v in net.state_dict().values())
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


# --- the decoder ---------------------------------------------------------------------------------------------


def test_the_decoder_learns_from_images(unet, clip, fit):
    net = unet(embedding_width=16)
    module, before, spy, batch = DecoderModule(net, PROCESS, clip, FAST, SIDE), copied(net), Spy(net), image_batch()
    fit(module, batch)
    assert {"conv_out.spatial.weight", "embedding.weight", "time.0.weight"} <= moved(net, before)
    (z, t), given = spy.calls[0]
    assert z.shape == (3, 3, SIDE, SIDE) and given["fps"] is None and "given" not in given
    assert torch.equal(given["embedding"], scaled(clip.encode_image(batch["image"])))
    (z2, t2), _ = spy.calls[1]
    assert not torch.equal(z, z2) and t.dtype == torch.long


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_with_every_optimiser(unet, clip, fit, precision, fused):
    net = unet(embedding_width=16)
    module = DecoderModule(net, PROCESS, clip, OptimConfig(fused=fused), SIDE)
    fit(module, image_batch(), ClipGradients(1e-3, 0, EMA(0.9)), steps=1, precision=precision)
    norm = torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert module.trainer.callback_metrics["gradient_norm"] > 1e-2


def test_the_decoder_learns_from_clips_without_text(unet, clip, fit):
    net = unet(temporal=True, embedding_width=16)
    module, before, spy, batch = DecoderModule(net, PROCESS, clip, FAST, SIDE), copied(net), Spy(net), video_batch()
    fit(module, batch)
    changed = moved(net, before)
    assert {"fps.2.weight", "conv_in.temporal.weight", "conv_out.spatial.weight"} <= changed
    (z, t), given = spy.calls[0]
    assert z.shape == (2, 3, FRAMES, SIDE, SIDE) and torch.equal(given["fps"], batch["fps"])
    assert torch.equal(given["embedding"], scaled(clip.encode_image(batch["video"][:, :, 0])))


def test_what_is_noised_is_the_batch(unet, clip, monkeypatch):
    """The network that predicts the true noise has no loss; pixels run from -1 to 1."""
    process = Diffusion(DiffusionConfig())
    seen = []
    noised = process.noised
    monkeypatch.setattr(process, "noised", lambda x0, t, eps: seen.append((x0, eps)) or noised(x0, t, eps))
    net, batch = unet(embedding_width=16, learned_variance=False), image_batch()
    batch["image"][0], batch["image"][1] = 0, 255
    module = DecoderModule(net, process, clip, FAST, SIDE)
    monkeypatch.setattr(net, "forward", lambda *args, **kwargs: seen[-1][1])
    assert module.training_step(batch, 0) == 0
    x0 = seen[0][0]
    assert x0[0].eq(-1).all() and x0[1].eq(1).all()
    torch.testing.assert_close(x0[2], batch["image"][2] / 127.5 - 1)


@pytest.mark.parametrize("module_class", [DecoderModule, InterpolationModule, SuperResolutionModule])
def test_a_video_stage_never_reads_a_caption(unet, clip, fit, module_class):
    batch = video_batch()
    if module_class is SuperResolutionModule:
        module = SuperResolutionModule(unet(temporal=True, low_res=True), PROCESS, FAST, factor=2)
    else:
        net = unet(temporal=True, masked=module_class is InterpolationModule, embedding_width=16)
        module = module_class(net, PROCESS, clip, FAST, SIDE)
    torch.manual_seed(3)
    plain = module.training_step(batch, 0)
    torch.manual_seed(3)
    assert torch.equal(module.training_step(Untouchable(batch, text=["a fox", "a car"]), 0), plain)
    module.sample(Untouchable(batch, text=["a fox", "a car"]), steps=1)
    with pytest.raises(AssertionError, match="caption"):
        Untouchable(batch)["text"]


@pytest.mark.parametrize("frame, index", [("first", 0), ("middle", 3)])
def test_the_clip_frame(unet, clip, frame, index):
    module = DecoderModule(unet(temporal=True, embedding_width=16), PROCESS, clip, FAST, SIDE, clip_frame=frame)
    batch = video_batch()
    assert torch.equal(module.embedding(batch), scaled(clip.encode_image(batch["video"][:, :, index])))
    assert not torch.allclose(module.embedding(batch), scaled(clip.encode_image(batch["video"][:, :, 1])))


def test_the_clip_frame_mean_and_random(unet, clip):
    net, batch = unet(temporal=True, embedding_width=16), video_batch()
    every = torch.stack([clip.encode_image(batch["video"][:, :, i]) for i in range(FRAMES)])  # f b d
    mean = DecoderModule(net, PROCESS, clip, FAST, SIDE, clip_frame="mean").embedding(batch)
    torch.testing.assert_close(mean, scaled(F.normalize(every.mean(0), dim=-1)))
    module = DecoderModule(net, PROCESS, clip, FAST, SIDE, clip_frame="random")
    chosen = set()
    for _ in range(60):
        distance = (module.embedding(batch) - scaled(every)).abs().amax(-1)  # f b
        assert (distance.amin(0) < 1e-5).all()
        chosen |= set(enumerate(distance.argmin(0).tolist()))
    assert chosen == {(b, f) for b in range(2) for f in range(FRAMES)}
    with pytest.raises(ValueError, match="'last' .* first, middle, random, mean"):
        DecoderModule(net, PROCESS, clip, FAST, SIDE, clip_frame="last")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_without_embedding(unet, clip, share):
    net = unet(embedding_width=16)
    module, spy = DecoderModule(net, PROCESS, clip, FAST, SIDE, drop=share), Spy(net)
    batch = {"image": torch.zeros(400, 3, 2, 2, dtype=torch.uint8)}
    with torch.no_grad():
        module.training_step(batch, 0)
    assert spy.calls[0][1]["drop"].float().mean().item() == pytest.approx(share, abs=0.08 * (0 < share < 1))


@pytest.mark.parametrize("masked", [False, True])
def test_freeze_spatial_trains_the_temporal_keys_alone(unet, clip, fit, masked):
    net = unet(temporal=True, masked=masked, embedding_width=16)
    kind = InterpolationModule if masked else DecoderModule
    module, before = kind(net, PROCESS, clip, FAST, SIDE, freeze_spatial=True), copied(net)
    trainer = fit(module, video_batch(frames=5), StepSeed(1), steps=3)
    assert moved(net, before) == net.temporal_keys()
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for k, p in net.named_parameters() if k in net.temporal_keys()}


def test_the_checkpoint_has_no_clip(unet, clip):
    module = DecoderModule(unet(embedding_width=16), PROCESS, clip, FAST, SIDE)
    assert {k.split(".")[0] for k in module.state_dict()} == {"net"}


# --- interpolation -------------------------------------------------------------------------------------------


def test_masks_cover_every_use():
    frames = 16
    masks = random_masks(3000, frames)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    kinds: dict[str, int] = {}
    for mask in masks:
        shown = mask.nonzero().flatten().tolist()
        kind = "other"
        if not shown:
            kind = "nothing"
        elif shown in (list(range(0, frames, 3)), list(range(0, frames, 5)), [0, 15]):
            kind = f"every {shown[1] - shown[0]}"
        elif shown == list(range(len(shown))):
            kind = "head"
        elif shown == list(range(frames - len(shown), frames)):
            kind = "tail"
        kinds[kind] = kinds.get(kind, 0) + 1
    assert set(kinds) == {"every 3", "every 5", "every 15", "head", "tail", "nothing"}
    assert 0.7 < (kinds["every 3"] + kinds["every 5"] + kinds["every 15"] - kinds["head"]) / 3000 < 0.8
    assert min(kinds.values()) > 100
    heads = {int(m.sum()) for m in masks if m[0] == 1 and m[1] == 1} | {
        int(m.sum()) for m in masks if m[0] and not m[1:].any()
    }
    assert {1, 2} <= heads and max(heads) < frames  # one given frame is image animation


@pytest.mark.parametrize("frames", [3, 4, 14])
def test_masks_of_other_lengths_leave_something_to_do(frames):
    torch.manual_seed(0)
    masks = random_masks(300, frames)
    assert masks.shape == (300, frames) and (masks.mean(1) < 1).float().mean() > 0.2


def test_interpolation_gives_frames_and_their_mask(unet, clip, fit):
    net, frames = unet(temporal=True, masked=True, embedding_width=16), 16
    module, before, spy, batch = (
        InterpolationModule(net, PROCESS, clip, FAST, SIDE),
        copied(net),
        Spy(net),
        video_batch(2, frames),
    )
    fit(module, batch, StepSeed(0))
    assert "conv_given.weight" in moved(net, before)
    x0 = batch["video"] / 127.5 - 1
    for _, kwargs in spy.calls:
        shown, mask = kwargs["given"][:, :3], kwargs["given"][:, 3:]
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert (mask.amax(dim=(3, 4)) == mask.amin(dim=(3, 4))).all()
        torch.testing.assert_close(shown, x0 * mask)
    assert any(kwargs["given"][:, 3].any() for _, kwargs in spy.calls)


# --- super-resolution ----------------------------------------------------------------------------------------


def test_sr_on_images(unet, fit):
    net = unet(low_res=True)
    module, before, spy, batch = (
        SuperResolutionModule(net, PROCESS, FAST, factor=2),
        copied(net),
        Spy(net),
        image_batch(),
    )
    del batch["text"]
    fit(module, batch)
    assert {"conv_in.spatial.weight", "noise_level.0.weight", "conv_out.spatial.weight"} <= moved(net, before)
    (z, t), kwargs = spy.calls[0]
    assert z.shape == kwargs["low_res"].shape == (3, 3, 1, SIDE, SIDE) and kwargs["fps"] is None


@pytest.mark.parametrize("temporal", [False, True])
def test_sr_on_clips(unet, fit, temporal):
    """SR_l^t sees clips and their fps; SR_h, without time, sees each frame as an image."""
    net = unet(temporal=temporal, low_res=True)
    module, before, spy, batch = (
        SuperResolutionModule(net, PROCESS, FAST, factor=2),
        copied(net),
        Spy(net),
        video_batch(),
    )
    fit(module, batch)
    assert ("fps.2.weight" in moved(net, before)) == temporal and moved(net, before)
    (z, t), kwargs = spy.calls[0]
    if temporal:
        assert z.shape == (2, 3, FRAMES, SIDE, SIDE) and torch.equal(kwargs["fps"], batch["fps"]) and len(t) == 2
    else:
        assert z.shape == (2 * FRAMES, 3, 1, SIDE, SIDE) and kwargs["fps"] is None and len(t) == 2 * FRAMES
    x0, _ = module.target(batch)
    frame = x0[1, :, 2] if temporal else x0[FRAMES + 2, :, 0]
    torch.testing.assert_close(frame, batch["video"][1, :, 2] / 127.5 - 1)


def test_the_small_clip_is_the_large_one_made_small(unet):
    net, batch = unet(temporal=True, low_res=True), smooth_batch(n=16)
    module, spy = SuperResolutionModule(net, PROCESS, FAST, factor=2, blur=0.0, max_noise_level=1), Spy(net)
    with torch.no_grad():
        module.training_step(batch, 0)
    low, level = spy.calls[0][1]["low_res"], spy.calls[0][1]["noise_level"]
    real = batch["video"] / 127.5 - 1
    assert level.eq(0).all() and real.std() > 0.3
    assert (low - real)[..., 2:-2, 2:-2].abs().amax() < 0.05
    halves = torch.stack([F.avg_pool2d(real[:, :, i], 2) for i in range(3)], dim=2)
    torch.testing.assert_close(
        resized(real, real.shape[-1] // 2)[..., 1:-1, 1:-1], halves[..., 1:-1, 1:-1], atol=0.01, rtol=0
    )


def test_half_of_the_small_clips_are_blurred(unet):
    net, cells = unet(low_res=True), torch.randint(256, (200, 3, 4, 4), dtype=torch.uint8)
    images = cells.repeat_interleave(4, -1).repeat_interleave(4, -2)
    module, spy = SuperResolutionModule(net, PROCESS, FAST, factor=2, blur=5.0, max_noise_level=1), Spy(net)
    with torch.no_grad():
        module.training_step({"image": images}, 0)
    low = spy.calls[0][1]["low_res"][:, :, 0]
    small = resized((images / 127.5 - 1).unsqueeze(2), images.shape[-1] // 2).squeeze(2)
    distances = []
    for row in (small, gaussian_blur(small, 5.0)):
        large = F.interpolate(row, (16, 16), mode="bilinear", align_corners=False)
        distances.append((low - large).abs().flatten(1).mean(1))
    sharp, soft = distances
    assert (torch.minimum(sharp, soft) < 0.01).all() and (torch.maximum(sharp, soft) > 0.05).all()
    assert 0.35 < (soft < sharp).float().mean() < 0.65


def test_noise_levels_are_drawn_below_the_limit(unet):
    net = unet(low_res=True)
    module, spy = SuperResolutionModule(net, PROCESS, FAST, factor=2, max_noise_level=20), Spy(net)
    with torch.no_grad():
        module.training_step({"image": torch.zeros(300, 3, 4, 4, dtype=torch.uint8)}, 0)
    (z, t), kwargs = spy.calls[0]
    assert set(kwargs["noise_level"].tolist()) == set(range(20)) and t.max() > 900
    assert kwargs["low_res"][kwargs["noise_level"] > 15].std() > 0.02


# --- the prior and CLIP ------------------------------------------------------------------------------------------


def test_the_prior_learns_from_captions(clip, fit):
    net = Prior(PriorConfig(width=16, depth=1, head_width=16, embedding_width=16, context_length=12))
    process = Diffusion(DiffusionConfig(prediction="x0"))
    module, before, spy, batch = PriorModule(net, process, clip, FAST, drop=0.0), copied(net), Spy(net), image_batch()
    fit(module, batch, StepSeed(0))
    assert {"token.weight", "out.weight", "text.weight", "noised.weight"} <= moved(net, before)
    (z, t, tokens, text), kwargs = spy.calls[0]
    assert torch.equal(tokens, clip.tokens(batch["text"])) and not kwargs["drop"].any()
    assert torch.equal(text, scaled(clip.encode_text(batch["text"])))
    torch.testing.assert_close(text.square().mean(1), torch.ones(3))


def test_the_prior_predicts_the_image_embedding(clip, monkeypatch):
    net = Prior(PriorConfig(width=16, depth=1, head_width=16, embedding_width=16, context_length=12))
    module, batch = PriorModule(net, Diffusion(DiffusionConfig(prediction="x0")), clip, FAST), image_batch()
    monkeypatch.setattr(net, "forward", lambda *args, **kwargs: scaled(clip.encode_image(batch["image"])))
    assert module.training_step(batch, 0) == 0


def test_clip_learns_to_match(clip_net, fit):
    module, batch = ClipModule(clip_net, OptimConfig(lr=5e-3)), image_batch()
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    fit(module, batch, Watch(), steps=12)
    assert losses[-1] < 0.8 * losses[0]


def test_the_scale_of_clips_logits_is_bounded(clip_net, fit):
    with torch.no_grad():
        clip_net.logit_scale.fill_(6.0)
    fit(ClipModule(clip_net, OptimConfig(lr=1e-3)), image_batch())
    assert clip_net.logit_scale <= 4.6052 + 2e-3  # the clamp comes before a step, not after it


# --- the optimiser -----------------------------------------------------------------------------------------------


def test_the_schedule():
    net = nn.Linear(2, 2)
    result = optimizers(net, OptimConfig(lr=1.0, warmup=3, schedule="cosine"), max_steps=100)
    optimizer, scheduler, rates = result["optimizer"], result["lr_scheduler"]["scheduler"], []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75], rel=0.01) and max(rates) == rates[3]
    assert rates[50] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="'step' .* constant, cosine"):
        optimizers(net, OptimConfig(schedule="step"), 10)


# --- seeds and the average ---------------------------------------------------------------------------------------


class Draws(L.LightningModule):
    """Keeps what every step draws; its one network moves by it."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(3, 2), []

    def training_step(self, batch, batch_idx):
        draw = torch.rand(3)
        self.seen.append(draw)
        torch.rand(int(torch.randint(1, 9, ())))  # how much a step draws is its own affair
        return self.net(draw).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_every_step_has_draws_of_its_own(fit):
    runs = []
    for seed in (0, 0, 1):
        module = Draws()
        torch.rand(len(runs))  # what was drawn before does not matter
        fit(module, {"x": torch.zeros(1)}, StepSeed(seed), steps=4)
        runs.append(torch.stack(module.seen))
    assert torch.equal(runs[0], runs[1]) and not (runs[0] == runs[2]).any()
    assert len(runs[0].unique()) == 12


def test_a_restart_draws_and_trains_the_same(unet, clip, fit, tmp_path):
    """Six steps, and three with three more after a restart: the same weights and the same average, bit for bit."""
    path, results = tmp_path / "step3.ckpt", []
    for stops in ((6,), (3, 6)):
        for i, steps in enumerate(stops):
            torch.manual_seed(10)
            net = unet(temporal=True, embedding_width=16, dropout=0.2)
            ema = EMA(0.9)
            module = DecoderModule(net, PROCESS, clip, FAST, SIDE, clip_frame="random")
            torch.manual_seed(20 + steps + i)
            batch = video_batch(1, 3)
            batch["video"] = torch.arange(batch["video"].numel()).view_as(batch["video"]).to(torch.uint8)
            trainer = fit(module, batch, StepSeed(5), ema, steps=steps, ckpt_path=path if i else None)
            assert trainer.global_step == steps
            trainer.save_checkpoint(path)
        results.append((net.state_dict(), ema.average, ema.updates))
    (a, average_a, n), (b, average_b, m) = results
    assert n == m == 6
    assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(average_a[k], average_b[k]) for k in average_a)


class Watch(L.Callback):
    """The parameters after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({k: p.detach().clone() for k, p in pl_module.net.named_parameters()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_by_hand(fit, accumulate):
    module, ema, watch = Draws(), EMA(0.3), Watch()
    expected = {k: p.detach().clone() for k, p in module.net.named_parameters()}
    fit(module, {"x": torch.zeros(1)}, StepSeed(0), watch, ema, steps=5, accumulate_grad_batches=accumulate)
    assert len(watch.seen) == 5 * accumulate
    for n, weights in enumerate(watch.seen[accumulate - 1 :: accumulate], start=1):
        decay = min(0.3, (1 + n) / (10 + n))  # warm-up: 2/11, 3/12, then 0.3
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    assert ema.updates == 5
    for key, value in expected.items():
        torch.testing.assert_close(ema.average[key], value)
        assert not torch.allclose(value, watch.seen[-1][key])


def test_the_average_goes_through_a_checkpoint_of_plain_types(fit, tmp_path):
    module, ema, path = Draws(), EMA(0.9), tmp_path / "a.ckpt"
    fit(module, {"x": torch.zeros(1)}, ema, steps=3).save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    (saved,) = [v for k, v in state["callbacks"].items() if "EMA" in k]
    assert saved["updates"] == 3 and all(torch.equal(saved["average"][k], v) for k, v in ema.average.items())
    other, again = Draws(), EMA(0.9)
    trainer = fit(other, {"x": torch.zeros(1)}, again, steps=3, ckpt_path=path)  # nothing left to do
    assert trainer.global_step == 3 and again.updates == 3
    assert all(torch.equal(again.average[k], v) for k, v in ema.average.items())


def test_two_swaps_are_none(fit):
    module, ema = Draws(), EMA(0.9)
    fit(module, {"x": torch.zeros(1)}, ema, steps=3)
    weights, average = copied(module.net), {k: v.clone() for k, v in ema.average.items()}
    ema.swap(module.net)
    assert all(torch.equal(module.net.state_dict()[k], average[k]) for k in average)
    assert all(torch.equal(ema.average[k], weights[k]) for k in average)
    assert not any(torch.equal(weights[k], average[k]) for k in average)
    ema.swap(module.net)
    assert all(torch.equal(module.net.state_dict()[k], weights[k]) for k in weights)
    assert all(torch.equal(ema.average[k], average[k]) for k in average)


@pytest.mark.parametrize("make", [image_batch, video_batch])
def test_clip_reads_the_picture_before_it_is_made_small(unet, clip, make):
    """Where CLIP reads more pixels than the decoder makes, its embedding is that of the larger picture."""
    batch = make(side=4 * SIDE)
    video = "video" in batch
    spy = Spy(net := unet(temporal=video, embedding_width=16))
    module = DecoderModule(net, PROCESS, clip, FAST, SIDE)
    module.loss(batch)
    z = spy.calls[-1][0][0]
    assert z.shape[-2:] == (SIDE, SIDE)
    large = batch["video"][:, :, 0] if video else batch["image"]
    torch.testing.assert_close(module.embedding(batch), scaled(clip.encode_image(large)))


class Spikes(Draws):
    """Some of its batches have a loss, or a gradient, that is not finite."""

    def __init__(self, **spikes):
        super().__init__()
        self.spikes = spikes

    def training_step(self, batch, batch_idx):
        kind, loss = self.spikes.get(f"batch_{batch_idx}"), super().training_step(batch, batch_idx)
        # the first has a finite gradient, the second has a finite loss
        return loss + float("inf") if kind == "loss" else loss + (0 * loss).sqrt() if kind == "gradient" else loss

    def configure_optimizers(self):
        return optimizers(self.net, OptimConfig(lr=0.1, weight_decay=0.1, warmup=9), 10)


class Everything(L.Callback):
    """Weights, average and optimiser state after every step."""

    def __init__(self, ema):
        self.ema, self.seen = ema, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {
            "weights": copied(pl_module.net),
            "average": self.ema.average,
            "optimizer": trainer.optimizers[0].state_dict()["state"],
        }
        self.seen.append((copy.deepcopy(state), trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_moves_nothing_but_the_schedule(fit, kind, accumulate):
    """One bad batch of an accumulation, be it the first, spoils its step."""
    module, ema = Spikes(**{f"batch_{2 * accumulate}": kind}), EMA(0.5)
    clip, watch = ClipGradients(1.0, 1, ema), Everything(ema)
    fit(module, {"x": torch.zeros(1)}, StepSeed(0), clip, ema, watch, steps=4, accumulate_grad_batches=accumulate)
    states = [(str(state), rate) for state, rate in watch.seen[accumulate - 1 :: accumulate]]
    assert len(states) == 4 and (clip.skipped, clip.in_a_row) == (1, 0)
    assert states[1][0] == states[2][0] and len({state for state, _ in states}) == 3
    assert len({rate for _, rate in states}) == 4


def test_more_in_a_row_than_allowed_stop_the_run(fit):
    module, ema = Spikes(batch_0="loss", batch_2="loss", batch_3="gradient"), EMA(0.5)
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 4, had a loss or a gradient"):
        fit(module, {"x": torch.zeros(1)}, StepSeed(0), ClipGradients(0.0, 1, ema), ema, steps=9)
