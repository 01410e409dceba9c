"""Rectified flow and diffusion are two sides of a coin: the paper's Eq. 5 and its appendix B.2, in float64.

A path z_t = alpha x + sigma eps has a velocity u, the mean of alpha' x + sigma' eps given z_t. By appendix B.2 the diffusion with its
marginals has f = d/dt log alpha and g^2 = 2 alpha sigma d/dt (sigma / alpha), and Eq. 7 with eta = epsilon / g is Eq. 8.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import train_grpo_flux
import train_grpo_sd

BETA = 0.1, 19.9  # of the variance-preserving SDE: beta(t) = 0.1 + 19.9 t
PATHS = {
    "rectified flow": (lambda t: 1 - t, lambda t: t),
    "variance preserving, of appendix B.1": (lambda t: (1 - t**2).sqrt(), lambda t: t),
    "variance preserving, of linear betas": (
        lambda t: (-(BETA[0] * t + BETA[1] * t**2 / 2) / 2).exp(),
        lambda t: (1 - (-(BETA[0] * t + BETA[1] * t**2 / 2)).exp()).sqrt(),
    ),
    # rectified flow, scaled to keep the variance
    "variance preserving, of rectified flow": (
        lambda t: (1 - t) / (1 - 2 * t + 2 * t**2).sqrt(),
        lambda t: t / (1 - 2 * t + 2 * t**2).sqrt(),
    ),
}
CLOSED = {  # f, g^2
    "rectified flow": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    "variance preserving, of appendix B.1": (lambda t: -t / (1 - t**2), lambda t: 2 * t / (1 - t**2)),
    "variance preserving, of linear betas": (lambda t: -(BETA[0] + BETA[1] * t) / 2, lambda t: BETA[0] + BETA[1] * t),
}
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
# Data in one dimension: means, standard deviations and weights of Gaussians.
MIXTURE = torch.tensor([[-0.6, 1.0], [0.4, 0.25], [0.4, 0.6]], dtype=torch.float64)
GAUSSIAN = torch.tensor([[1.0], [0.25], [1.0]], dtype=torch.float64)


def derivative(function, t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


def diffusion_of(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """f and g^2 as the summary of appendix B.2 has them, by automatic differentiation."""
    alpha, sigma = PATHS[path]
    return derivative(lambda t: alpha(t).log(), t), 2 * alpha(t) * sigma(t) * derivative(lambda t: sigma(t) / alpha(t), t)


def score(path: str, z: Tensor, t: Tensor, data: Tensor = MIXTURE) -> Tensor:
    """Of the marginal of z_t, whose density is known, by automatic differentiation."""
    alpha, sigma = (part(t) for part in PATHS[path])
    means, stds, weights = data

    def log_density(z: Tensor) -> Tensor:
        variance = alpha**2 * stds**2 + sigma**2
        return (weights.log() - variance.log() / 2 - (z[:, None] - alpha * means) ** 2 / (2 * variance)).logsumexp(1)

    return derivative(log_density, z)


def posterior(path: str, z: Tensor, t: Tensor, data: Tensor = MIXTURE) -> tuple[Tensor, Tensor]:
    """E[x | z_t] and E[eps | z_t], by Bayes' rule over components and, within each, of x."""
    alpha, sigma = (part(t) for part in PATHS[path])
    means, stds, weights = data
    variance = alpha**2 * stds**2 + sigma**2
    away = z[:, None] - alpha * means
    chances = (weights.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(1)
    x = (chances * (means + alpha * stds**2 / variance * away)).sum(1)
    return x, (z - alpha * x) / sigma


def velocity(path: str, z: Tensor, t: Tensor, data: Tensor = MIXTURE) -> Tensor:
    x, eps = posterior(path, z, t, data)
    return derivative(PATHS[path][0], t) * x + derivative(PATHS[path][1], t) * eps


def reverse_sde(path: str, z: Tensor, t: Tensor, eta: Tensor, data: Tensor = MIXTURE) -> tuple[Tensor, Tensor]:
    """Drift and diffusion of Eq. 7."""
    f, g2 = diffusion_of(path, t)
    return f * z - (1 + eta**2) / 2 * g2 * score(path, z, t, data), eta * g2.sqrt()


@pytest.mark.parametrize("path", CLOSED)
def test_f_and_g_are_their_closed_forms(path):
    """And keep the mean and the variance of the path: f alpha = alpha', and 2 f sigma^2 + g^2 = d/dt sigma^2."""
    f, g2 = diffusion_of(path, TIMES)
    torch.testing.assert_close(f, CLOSED[path][0](TIMES), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(g2, CLOSED[path][1](TIMES), atol=1e-10, rtol=1e-10)
    alpha, sigma = PATHS[path]
    torch.testing.assert_close(f * alpha(TIMES), derivative(alpha, TIMES), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(2 * f * sigma(TIMES) ** 2 + g2, derivative(lambda t: sigma(t) ** 2, TIMES), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.2])
def test_equation_7_with_matched_noise_is_equation_8(path, epsilon):
    """The same drift and diffusion at every point, of data whose score and velocity are found in different ways."""
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for t in TIMES:
        eta = epsilon / diffusion_of(path, t)[1].sqrt()
        drift, diffusion = reverse_sde(path, z, t, eta)
        torch.testing.assert_close(drift, velocity(path, z, t) - epsilon**2 / 2 * score(path, z, t), atol=1e-9, rtol=1e-9)
        assert diffusion.item() == pytest.approx(epsilon, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.3, 1.2])
def test_the_flows_transition_is_equation_7_with_matched_noise(epsilon):
    """`sde_step` of FLUX is given u alone; its drift and diffusion are those of the diffusion with f, g and eta of rectified flow."""
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for t, s in pairwise(TIMES.flip(0)):
        drift, diffusion = reverse_sde("rectified flow", z, t, epsilon / (2 * t / (1 - t)).sqrt())
        given = z[:, None], velocity("rectified flow", z, t)[:, None], t, s, epsilon
        mean, drawn = train_grpo_flux.sde_step(*given)[0], train_grpo_flux.sde_step(*given, noise=torch.ones_like(z[:, None]))[0]
        torch.testing.assert_close((mean[:, 0] - z) / (s - t), drift, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close((drawn - mean)[:, 0] / (t - s).sqrt(), diffusion.expand_as(z), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stable_diffusions_transition_becomes_equation_7(eta):
    """`sde_step` of Stable Diffusion is a discrete form: its drift and diffusion near those of Eq. 7 as fast as the step gets small."""
    path, z = "variance preserving, of linear betas", torch.linspace(-3, 3, 31, dtype=torch.float64)
    for t in TIMES[::6]:
        drift, diffusion = reverse_sde(path, z, t, torch.tensor(eta).double())
        errors = []
        for delta in (1e-3, 1e-4, 1e-5):
            alpha_bars = PATHS[path][0](t) ** 2, PATHS[path][0](t - delta) ** 2
            given = z[:, None], posterior(path, z, t)[1][:, None], *alpha_bars, eta
            mean, drawn = train_grpo_sd.sde_step(*given)[0], train_grpo_sd.sde_step(*given, noise=torch.ones_like(z[:, None]))[0]
            found = (mean[:, 0] - z) / -delta, (drawn - mean)[:, 0] / math.sqrt(delta)
            errors.append(max((found[0] - drift).abs().max().item(), (found[1] - diffusion).abs().max().item()))
        assert all(later < 0.12 * earlier for earlier, later in pairwise(errors)), errors
        assert errors[-1] < 0.02, errors


def test_equation_5_is_both_samplers_step_without_noise():
    """z~_s = z~_t + output (eta_s - eta_t), with z / alpha and sigma / alpha for eps-prediction, and z and t for rectified flow."""
    z, output = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, s in pairwise(TIMES.flip(0)):
        torch.testing.assert_close(train_grpo_flux.sde_step(z, output, t, s, 0.0)[0], z + output * (s - t), atol=1e-12, rtol=0)
        (alpha_t, alpha_s), (sigma_t, sigma_s) = ([part(t), part(s)] for part in PATHS["variance preserving, of linear betas"])
        z_s, _, _ = train_grpo_sd.sde_step(z, output, alpha_t**2, alpha_s**2, 0.0)
        torch.testing.assert_close(z_s / alpha_s, z / alpha_t + output * (sigma_s / alpha_s - sigma_t / alpha_t), atol=1e-9, rtol=1e-9)


def test_without_noise_the_flows_step_is_stable_diffusions_on_its_path():
    """Latents scaled to keep the variance, and u = eps - x said as eps: the Euler step of one script is the DDIM step of the other."""
    z, u = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, s in pairwise(TIMES.flip(0)):
        scale_t, scale_s = (1 / (1 - 2 * v + 2 * v**2).sqrt() for v in (t, s))
        alpha_bars = ((1 - t) * scale_t) ** 2, ((1 - s) * scale_s) ** 2
        ddim, _, _ = train_grpo_sd.sde_step(scale_t * z, z + (1 - t) * u, *alpha_bars, 0.0)
        torch.testing.assert_close(ddim / scale_s, train_grpo_flux.sde_step(z, u, t, s, 0.0)[0], atol=1e-10, rtol=0)


def moments(step, times: Tensor, scale) -> Tensor:
    """At each of `times` of an SDE that starts on the marginal, where N(1, 0.25^2) stays Gaussian, all divided by `scale`: the mean, the
    standard deviation, and the derivative by the start, which tells how much of it the noise has replaced.

    step: (z, t, s, whether with noise 1) -> the next z, affine in z.
    """
    t = times[0]
    mean, variance, kept = scale(t) * (1 - t), scale(t) ** 2 * ((1 - t) ** 2 * 0.25**2 + t**2), scale(t)
    found = []
    for t, s in pairwise(times):
        z = torch.stack([mean, mean + 1])
        z_s, drawn = step(z, t, s, False), step(z, t, s, True)
        slope = z_s[1] - z_s[0]
        mean, variance, kept = z_s[0], slope**2 * variance + (drawn - z_s)[0] ** 2, slope * kept
        found.append(torch.stack([mean, variance.sqrt(), kept]) / scale(s))
    return torch.stack(found)


@pytest.mark.parametrize("noise_schedule", ["constant", "decay", "flow_grpo"])
def test_the_flow_sde_and_a_vp_sde_with_matched_noise_are_one_process(noise_schedule):
    """At all times, up to the scale that keeps the variance: differences fall with the step, to 1 % of the data's standard deviation.

    Any noise has the same marginals; with other noise the process is another.
    """
    vp = "variance preserving, of rectified flow"

    def epsilon(t: Tensor) -> Tensor:
        return 0.7 * {"constant": torch.ones_like(t), "decay": t.sqrt(), "flow_grpo": (t / (1 - t)).sqrt()}[noise_schedule]

    def flow_step(z: Tensor, t: Tensor, s: Tensor, noisy: bool) -> Tensor:
        u = velocity("rectified flow", z, t, GAUSSIAN)
        return train_grpo_flux.sde_step(z[:, None], u[:, None], t, s, epsilon(t), noise=torch.full_like(z[:, None], float(noisy)))[0][:, 0]

    def vp_step(z: Tensor, t: Tensor, s: Tensor, noisy: bool, share: float = 1.0) -> Tensor:
        eta = share * epsilon(t) / (2 * t / (1 - t)).sqrt()  # epsilon / g of rectified flow
        drift, diffusion = reverse_sde(vp, z, t, eta, GAUSSIAN)
        return z + drift * (s - t) + float(noisy) * diffusion * (t - s).sqrt()

    def vp_scale(t: Tensor) -> Tensor:
        return 1 / (1 - 2 * t + 2 * t**2).sqrt()

    between, from_exact = [], []
    for num_steps in (30, 120, 480):
        times = torch.linspace(0.98, 0.02, num_steps + 1, dtype=torch.float64)
        flow, preserved = moments(flow_step, times, torch.ones_like), moments(vp_step, times, vp_scale)
        s = times[1:]
        exact = torch.stack([1 - s, ((1 - s) ** 2 * 0.25**2 + s**2).sqrt()], 1)
        between.append((flow - preserved).abs().max().item() / 0.25)
        from_exact.append((flow[:, :2] - exact).abs().max().item() / 0.25)
    for values in (between, from_exact):
        assert all(later < 0.35 * earlier for earlier, later in pairwise(values)), values
        assert values[-1] < 0.01 < values[0], values
    unmatched = (moments(partial(vp_step, share=0.8), times, vp_scale) - flow).abs().amax(0) / 0.25
    assert unmatched[:2].max() < 0.02 and unmatched[2] > 0.1, unmatched
