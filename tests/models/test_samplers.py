"""Samplers against x0 ~ N(mu, s^2), whose denoiser and probability flow are known."""

import pytest
import torch

from models.diffusion import Diffusion, DiffusionConfig
from models.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, guided, seeded_draw, shared_over_frames

MU, S = 0.6, 0.4
N = 10_000
PROCESSES = {
    "cosine": DiffusionConfig(),
    "linear": DiffusionConfig(schedule="linear"),
    "zero": DiffusionConfig(zero_terminal_snr=True, prediction="v"),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return Diffusion(PROCESSES[request.param])


def exact(process, z, t):
    """E[x0 | z] and Var[x0 | z]."""
    alpha, sigma = process.at(t, z)
    total = alpha**2 * S**2 + sigma**2
    return MU + alpha * S**2 * (z - alpha * MU) / total, S**2 * sigma**2 / total


def denoiser(process):
    return lambda z, t: (exact(process, z, t)[0], None)


def draw():
    return torch.randn(N, 1)


def flow(process, z):
    """Where the probability flow carries z: it keeps the number of deviations from the mean."""
    alpha, sigma = (x.double() for x in process.at(torch.full((len(z),), 999), z))
    return (MU + S * (z - alpha * MU) / (alpha**2 * S**2 + sigma**2).sqrt()).float()


@pytest.mark.parametrize("name, eta", [("ddpm", None), ("ddim", 0.0), ("ddim", 1.0), ("dpmpp_2m", None)])
def test_mean_and_deviation_are_recovered(process, name, eta):
    steps = {"ddpm": 500, "ddim": 500, "dpmpp_2m": 60}[name]
    options = {} if eta is None else {"eta": eta}
    x0 = SAMPLERS[name](denoiser(process), draw(), process.times(steps), draw, **options)
    assert x0.mean() == pytest.approx(MU, abs=0.015)
    assert x0.std() == pytest.approx(S, rel=0.03)


def test_deterministic_samplers_follow_the_flow(process):
    z = draw()

    def error(sampler, steps):
        x0 = sampler(denoiser(process), z, process.times(steps), lambda: pytest.fail("they draw no noise"))
        return (x0 - flow(process, z)).abs().mean().item()

    for steps, ratio in ((10, 0.9), (20, 0.5), (40, 0.2)):
        assert error(dpmpp_2m, steps) < ratio * error(ddim, steps)
    assert error(ddim, 1000) < 2e-3 and error(dpmpp_2m, 100) < 2e-3
    assert error(ddim, 200) < 0.3 * error(ddim, 40)


def test_the_learned_variance_makes_few_steps_enough(process):
    """With the variance of p(z_s | z_t) itself instead of the posterior's, ancestral sampling is exact."""
    times = process.times(20)

    def denoise(z, t):
        i = times.t.tolist().index(t[0].item())
        (alpha, sigma), (alpha_s, sigma_s) = ((times.alpha[j], times.sigma[j]) for j in (i, i + 1))
        beta = 1 - (alpha / alpha_s) ** 2
        small = (sigma_s / sigma) ** 2 * beta
        mean, variance = exact(process, z, t)
        wanted = small + (alpha_s * beta / sigma**2) ** 2 * variance
        return mean, (wanted.log() - small.log()) / (beta.log() - small.log())

    x0 = ddpm(denoise, draw(), times, draw)
    plain = ddpm(denoiser(process), draw(), times, draw)
    assert x0.mean() == pytest.approx(MU, abs=0.015)
    final = exact(process, x0, times.t[-1:].expand(N))[1].mean()  # the last call returns a mean, not a draw
    assert (x0.var() + final).sqrt() == pytest.approx(S, rel=0.02)
    assert abs(plain.std() - S) > 2 * abs(x0.std() - S)


def test_dpmpp_2m_is_the_papers():
    process = Diffusion(DiffusionConfig(schedule="linear"))
    times, denoise = process.times(6), denoiser(process)
    z = start = torch.randn(50, 1)
    lam = (times.alpha / times.sigma).log()
    clean = []
    for i in range(6):
        clean.append(denoise(z, times.t[i].expand(50))[0])
        h = lam[i + 1] - lam[i]
        direction = clean[i]
        if 0 < i < 5:
            r = (lam[i] - lam[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * clean[i] - clean[i - 1] / (2 * r)
        z = times.sigma[i + 1] / times.sigma[i] * z - times.alpha[i + 1] * ((-h).exp() - 1) * direction
    torch.testing.assert_close(dpmpp_2m(denoise, start, times, lambda: None), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_one_call_for_each_time_and_the_last_is_final(process, sampler):
    times, seen = process.times(5), []

    def denoise(z, t):
        assert t.shape == (N,) and z.isfinite().all()
        seen.append(t[0].item())
        return torch.full_like(z, 0.25), None

    x0 = sampler(denoise, draw(), times, draw)
    assert seen == times.t.tolist()
    torch.testing.assert_close(x0, torch.full_like(x0, 0.25), atol=1e-6, rtol=0)


def test_eta_one_is_ancestral_and_eta_zero_draws_nothing(process):
    """DDIM at eta = 1 is DDPM, given the same noise."""
    z, times = torch.randn(N, 1), process.times(50)
    noise = torch.randn(50, N, 1)
    a, b = (iter(noise) for _ in range(2))
    x = ddim(denoiser(process), z, times, lambda: next(a), eta=1.0)
    y = ddpm(denoiser(process), z, times, lambda: next(b))
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x, ddim(denoiser(process), z, times, lambda: pytest.fail("no noise at eta = 0")))


def test_guidance():
    calls = []

    def network(name, value):
        return lambda z, t: calls.append(name) or (z * 0 + value, torch.full_like(z, value))

    with_it, without = network("with", 2.0), network("without", 0.5)
    z, t = torch.zeros(2, 3), torch.zeros(2)
    x0, fraction = guided(with_it, without, 1)(z, t)
    assert calls == ["with"] and x0.eq(2.0).all()
    x0, fraction = guided(with_it, without, 3.0)(z, t)
    assert calls == ["with", "with", "without"]
    assert x0.eq(0.5 + 3 * 1.5).all() and fraction.eq(2.0).all()
    assert guided(with_it, without, 0.0)(z, t)[0].eq(0.5).all()


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_takes_back_its_wider_range(share):
    """arXiv 2305.08891, eqs. 14 to 16, for each sample alone."""
    condition, shift = torch.randn(3, 2, 50), torch.randn(3, 2, 50)
    with_it = condition * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    network, none = (lambda z, t: (with_it, None)), (lambda z, t: (with_it - shift, None))
    z, t = torch.zeros(3, 2, 50), torch.zeros(3)
    plain, rescaled = (guided(network, none, 5.0, rescale)(z, t)[0] for rescale in (0.0, share))
    for x, y, c in zip(plain, rescaled, with_it, strict=True):
        torch.testing.assert_close(y, share * x * c.std() / x.std() + (1 - share) * x)
    if share == 1:
        torch.testing.assert_close(rescaled.flatten(1).std(1), with_it.flatten(1).std(1))


def test_a_sample_does_not_depend_on_its_batch():
    many = seeded_draw([3, 4, 5], (2, 2), "cpu")
    alone = seeded_draw([4], (2, 2), "cpu")
    first, second = many(), many()
    assert torch.equal(first[1], alone()[0]) and torch.equal(second[1], alone()[0])
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    state = torch.get_rng_state()
    many()
    assert torch.equal(torch.get_rng_state(), state)
    noise = seeded_draw(range(8), (5000,), "cpu")()
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(8)).abs().max() < 0.07


def test_shared_noise_is_the_same_in_every_frame():
    shared = shared_over_frames(seeded_draw([1, 2], (3, 4, 4), "cpu"), 5)
    first, second = shared(), shared()
    assert first.shape == (2, 3, 5, 4, 4)
    assert torch.equal(first, first[:, :, :1].expand_as(first))
    assert torch.equal(first[:, :, 0], seeded_draw([1, 2], (3, 4, 4), "cpu")())
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
