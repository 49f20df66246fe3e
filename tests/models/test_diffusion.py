"""The forward process and its losses, against closed forms and brute force."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from models.diffusion import (
    Diffusion,
    DiffusionConfig,
    alphas_cumprod,
    discretised_log_likelihood,
    gaussian_blur,
    interpolated_log_variance,
    low_res_condition,
    posterior,
)


def diffusion(**options):
    return Diffusion(DiffusionConfig(**options))


def sample(n=4, channels=3):
    x0 = torch.rand(n, channels, 2, 4, 4) * 2 - 1
    return x0, torch.randn_like(x0)


@pytest.mark.parametrize("steps", [10, 1000])
def test_the_cosine_schedule(steps):
    def g(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = alphas_cumprod("cosine", steps)
    for t in (1, steps // 2, steps - 1):
        assert abar[t - 1] == pytest.approx(g(t) / g(0), rel=1e-9)
    assert abar[-1] == pytest.approx(abar[-2].item() * 0.001, rel=1e-9)  # beta is clipped at 0.999
    assert (abar.diff() < 0).all()


def test_the_linear_schedule():
    abar, product = alphas_cumprod("linear", 1000), 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert abar[0] == pytest.approx(0.9999, rel=1e-12)
    assert abar[-1] == pytest.approx(product, rel=1e-9) == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_zero_terminal_snr_ends_at_pure_noise(schedule):
    plain = diffusion(schedule=schedule, prediction="v")
    zero = diffusion(schedule=schedule, prediction="v", zero_terminal_snr=True)
    assert plain.abar[-1] > 0 and zero.abar[-1] == 0
    assert zero.abar[0] == pytest.approx(plain.abar[0].item(), rel=1e-12) and (zero.abar.diff() < 0).all()
    x0, eps = sample(1)
    assert torch.equal(zero.noised(x0, torch.tensor([999]), eps), eps)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_variance_is_preserved(schedule):
    alpha, sigma = diffusion(schedule=schedule).at(torch.arange(1000), torch.zeros(1000, 1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, 1))
    assert alpha.shape == (1000, 1)


@pytest.mark.parametrize("prediction, zero", [("eps", False), ("x0", False), ("v", False), ("x0", True), ("v", True)])
def test_the_target_gives_the_clean_sample_back(prediction, zero):
    process = diffusion(prediction=prediction, zero_terminal_snr=zero)
    x0, eps = sample()
    t = torch.tensor([0, 10, 500, 900 if prediction == "eps" else 999])
    z = process.noised(x0, t, eps)
    target = process.target(x0, t, eps)
    torch.testing.assert_close(process.to_x0(target, z, t), x0, atol=2e-5, rtol=1e-4)
    assert torch.equal(process.loss(target, x0, z, t, eps), torch.zeros(4))
    worse = process.loss(target + 0.5, x0, z, t, eps)
    torch.testing.assert_close(worse, torch.full((4,), 0.25))


def test_v_is_the_papers():
    process = diffusion(prediction="v")
    (x0, eps), t = sample(1), torch.tensor([400])
    alpha, sigma = process.abar[400].sqrt().float(), (1 - process.abar[400]).sqrt().float()
    z, v = process.noised(x0, t, eps), process.target(x0, t, eps)
    torch.testing.assert_close(v, alpha * eps - sigma * x0)
    torch.testing.assert_close(alpha * v + sigma * z, eps)


@pytest.mark.parametrize("t, s", [(999, 998), (700, 300), (20, 19), (1, 0)])
def test_the_posterior_is_bayes(t, s):
    abar = alphas_cumprod("cosine", 1000)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((abar[i].sqrt(), (1 - abar[i]).sqrt()) for i in (t, s))
    x0 = torch.tensor(0.7).double()
    z = alpha_t * x0 - 0.8 * sigma_t
    mean, variance, beta = posterior(x0, z, alpha_t, sigma_t, alpha_s, sigma_s)
    assert beta == pytest.approx((sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).item(), rel=1e-6)
    grid = torch.linspace(-9, 9, 100_001).double() * sigma_s + alpha_s * x0
    log_p = Normal(alpha_s * x0, sigma_s).log_prob(grid) + Normal(alpha_t / alpha_s * grid, beta.sqrt()).log_prob(z)
    p = log_p.softmax(0)
    assert mean == pytest.approx((p * grid).sum().item(), abs=1e-6)
    assert variance == pytest.approx((p * (grid - mean) ** 2).sum().item(), rel=1e-5)


@pytest.mark.parametrize("t", [0, 1, 5])
def test_the_posterior_in_float32(t):
    process, ones = diffusion(), torch.ones(1, 1)
    abar = torch.cat((torch.ones(1).double(), process.abar))
    double = [x for i in (t + 1, t) for x in (abar[i].sqrt(), (1 - abar[i]).sqrt())]
    single = [x.float() for x in double]
    for a, b in zip(posterior(ones, ones * 0, *single), posterior(ones, ones * 0, *double), strict=True):
        torch.testing.assert_close(a, b.float().expand_as(a), rtol=1e-5, atol=0)


def test_the_interpolated_variance_runs_from_small_to_large():
    small, large = torch.tensor([0.1, 0.0]), torch.tensor([0.4, 0.2])
    for fraction, expected in ((0.0, [0.1, 0.2]), (1.0, [0.4, 0.2]), (0.5, [0.2, 0.2])):
        got = interpolated_log_variance(torch.tensor(fraction), small, large).exp()
        torch.testing.assert_close(got, torch.tensor(expected))


def test_the_gradient_of_the_bound_stops_at_the_mean():
    process = diffusion(vlb_weight=1.0)
    (x0, eps), t = sample(), torch.tensor([1, 50, 300, 990])  # at t = 0 both ends of the variance are one
    z = process.noised(x0, t, eps)
    output = torch.randn(4, 6, 2, 4, 4, requires_grad=True)
    process.loss(output, x0, z, t, eps).sum().backward()
    simple = 2 * (output[:, :3].detach() - eps) / x0[0].numel()
    torch.testing.assert_close(output.grad[:, :3], simple)
    assert (output.grad[:, 3:].flatten(1).abs().amax(1) > 0).all()


def test_the_hybrid_loss():
    process = diffusion(vlb_weight=0.001)
    (x0, eps), t = sample(), torch.tensor([0, 1, 300, 990])
    z, output = process.noised(x0, t, eps), torch.randn(4, 6, 2, 4, 4) * 0.1
    prediction, raw = output.chunk(2, 1)
    bound = process.bound(process.to_x0(prediction, z, t), (raw + 1) / 2, x0, z, t)
    simple = (prediction - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(process.loss(output, x0, z, t, eps), simple + 0.001 * 1000 * bound)
    off = diffusion(vlb_weight=0.0)
    torch.testing.assert_close(off.loss(output, x0, z, t, eps), simple)


@pytest.mark.parametrize("zero", [False, True])
def test_the_bound_is_a_divergence(zero):
    process = diffusion(prediction="x0", zero_terminal_snr=zero)
    (x0, eps), t = sample(), torch.tensor([1, 100, 500, 999])
    z = process.noised(x0, t, eps)
    true = torch.zeros_like(x0)  # fraction 0 = betatilde, the variance of the posterior
    torch.testing.assert_close(process.bound(x0, true, x0, z, t), torch.zeros(4), atol=1e-6, rtol=0)
    guess, fraction = x0 + 0.3, torch.rand_like(x0)
    alpha, sigma = process.at(t, z)
    alpha_s, sigma_s = process.at(t - 1, z)
    mean, small, beta = posterior(x0, z, alpha, sigma, alpha_s, sigma_s)
    other = posterior(guess, z, alpha, sigma, alpha_s, sigma_s)[0]
    deviation = (0.5 * interpolated_log_variance(fraction, small, beta)).exp()
    expected = kl_divergence(Normal(mean, small.sqrt()), Normal(other, deviation)).flatten(1).mean(1) / math.log(2)
    got = process.bound(guess, fraction, x0, z, t)
    assert (got > 0).all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_the_bound_of_the_first_step_is_the_likelihood_of_the_pixels():
    process = diffusion(prediction="x0")
    x0 = torch.randint(256, (2, 3, 2, 4, 4)) / 127.5 - 1
    t = torch.zeros(2, dtype=torch.long)
    z = process.noised(x0, t, torch.randn_like(x0))
    guess, fraction = x0 + 0.02, torch.rand_like(x0)
    variance = (1 - process.abar[0]).float()
    expected = -discretised_log_likelihood(x0, guess, variance.log()).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(process.bound(guess, fraction, x0, z, t), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.013, 0.97])
@pytest.mark.parametrize("deviation", [0.001, 0.05, 1.0])
def test_the_256_pixel_values_have_probability_one(mean, deviation):
    pixels = torch.arange(256).double() / 127.5 - 1
    log_var = torch.tensor(2 * math.log(deviation)).double()
    p = discretised_log_likelihood(pixels, torch.tensor(mean).double(), log_var).exp()
    assert p.sum() == pytest.approx(1, abs=1e-8)
    if deviation == 0.001:
        assert abs(pixels[p.argmax()] - max(-1, mean)) <= 1 / 255 + 1e-9


@pytest.mark.parametrize(
    "prediction, divisor", [("eps", lambda snr: snr), ("v", lambda snr: snr + 1), ("x0", torch.ones_like)]
)
def test_min_snr_weights(prediction, divisor):
    process, t = diffusion(prediction=prediction, min_snr_gamma=5.0), torch.arange(1000)
    snr = process.abar / (1 - process.abar)
    expected = (snr.clamp(max=5) / divisor(snr)).float()
    torch.testing.assert_close(process.weight(t), expected)
    (x0, eps), few = sample(), torch.tensor([200, 400, 500, 600])
    z, output = process.noised(x0, few, eps), torch.randn(4, 3, 2, 4, 4)
    plain = diffusion(prediction=prediction).loss(output, x0, z, few, eps)
    torch.testing.assert_close(process.loss(output, x0, z, few, eps), plain * expected[few])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_of_almost_clean_samples(prediction):
    process = diffusion(prediction=prediction, min_snr_gamma=5.0)
    snr = process.abar[0] / (1 - process.abar[0])
    expected = 5 / (snr + (prediction == "v"))
    assert process.weight(torch.tensor([0])).item() == pytest.approx(expected.item(), rel=1e-4)


def test_pure_noise_is_trained_too():
    process = diffusion(prediction="v", min_snr_gamma=5.0, zero_terminal_snr=True)
    assert process.weight(torch.tensor([999])).item() == pytest.approx(0.01)


@pytest.mark.parametrize("n", [1, 7, 250, 1000])
def test_sampling_times_trail(n):
    process = diffusion(prediction="v", zero_terminal_snr=True)
    times = process.times(n)
    assert len(times.t) == n and len(times.alpha) == len(times.sigma) == n + 1
    assert times.t[0] == 999 and (times.t.diff() < 0).all() and times.t[-1] >= 0
    assert times.alpha[0] == 0 and times.alpha[-1] == 1 and times.sigma[-1] == 0
    torch.testing.assert_close(times.alpha[:-1].double() ** 2, process.abar[times.t], atol=1e-6, rtol=1e-5)
    if n > 1:
        gaps = -times.t.diff()
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(prediction="noise"), "noise"),
        (dict(schedule="sqrt"), "sqrt"),
        (dict(zero_terminal_snr=True, prediction="eps"), "zero_terminal_snr"),
    ],
)
def test_wrong_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        diffusion(**options)


@pytest.mark.parametrize("n", [0, 1001])
def test_wrong_numbers_of_steps_are_refused(n):
    with pytest.raises(ValueError, match=f"1000, not {n}"):
        diffusion().times(n)


def test_the_low_resolution_condition():
    process, low = diffusion(), torch.rand(3, 3, 2, 4, 4) * 2 - 1
    noise, level = torch.randn(3, 3, 2, 8, 8), torch.tensor([-1, 0, 250])
    got = low_res_condition(low, 8, process, level, noise)
    frames = [F.interpolate(low[:, :, i], (8, 8), mode="bilinear", align_corners=False) for i in range(2)]
    plain = torch.stack(frames, dim=2)
    assert torch.equal(got[0], plain[0])
    torch.testing.assert_close(got[1:], process.noised(plain, level.clamp(min=0), noise)[1:])
    assert (got[2] - plain[2]).std() > 0.2


def test_blur_keeps_the_mean_and_softens():
    flat, edge = torch.full((1, 3, 8, 8), 0.4), torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(gaussian_blur(flat, 0.6), flat)
    edge[0, 1, 4, 4] = 1
    soft = gaussian_blur(edge, 0.6)
    line = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0]) ** 2 / 0.36)
    torch.testing.assert_close(soft[0, 1, 3:6, 3:6], torch.outer(line, line) / line.sum() ** 2)
    assert soft[0, 0].abs().max() == 0 and soft.sum() == pytest.approx(1, abs=1e-6)
    assert torch.equal(gaussian_blur(edge, 0.0), edge)


@pytest.mark.parametrize("steps", [1, 7, 25, 600, 1000])
@pytest.mark.parametrize("bend", [1.0, 1.5, 3.0])
def test_bent_times_are_closer_near_the_clean_sample(steps, bend):
    times = Diffusion(DiffusionConfig()).times(steps, bend=bend).t
    gaps = -times.diff()
    assert (
        times[0] == 999 and times[-1] >= 0 and (gaps > 0).all()
    )  # the last step is among them, and no two are the same
    if bend > 1 and 7 <= steps <= 25:
        assert gaps[0] > gaps[-1] and times[steps // 2] < 999 * 0.5
    with pytest.raises(ValueError, match="1 or more"):
        Diffusion(DiffusionConfig()).times(steps, bend=0.5)
