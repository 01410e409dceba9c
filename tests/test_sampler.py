"""The sampling SDE: exact densities, the Euler limit, the marginals of the data, and why the last transition is not trained."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from train_grpo_flux import sde_step, time_schedule


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 8, 25])
def test_schedule_is_diffusers(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
    schedule = time_schedule(num_steps, shift)
    assert schedule.dtype == torch.float32 and schedule[0] == 1 and schedule[-1] == 0
    torch.testing.assert_close(schedule, scheduler.sigmas, atol=1e-6, rtol=0)


def test_noise_0_is_exactly_euler():
    z_t, u_hat = draw(3, 4, 5).float(), draw(3, 4, 5, seed=1).float()
    schedule = time_schedule(8, 3.0)
    for t, s in pairwise(schedule):
        z_s, log_prob, x0_hat = sde_step(z_t, u_hat, t, s, 0.0)
        assert log_prob is None
        assert torch.equal(z_s, z_t + u_hat * (s - t))
        assert torch.equal(x0_hat, z_t - t * u_hat)
    torch.testing.assert_close(z_s, x0_hat)  # the last transition, to s = 0, lands on x0_hat


def test_transition_is_the_gaussian_of_equation_8():
    """Against the drift and score written out as the paper has them, in float64, with torch's own density."""
    z_t, u, noise = draw(3, 4, 5), draw(3, 4, 5, seed=1), draw(3, 4, 5, seed=2)
    t, s, noise_level = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.6, 0.1]), 0.7
    z_s, log_prob, _ = sde_step(z_t, u, t, s, noise_level, noise=noise)
    for i in range(3):
        ti, si = t[i].double(), s[i].double()
        x = z_t[i] - ti * u[i]
        score = -(z_t[i] - (1 - ti) * x) / ti**2
        gaussian = torch.distributions.Normal(z_t[i] + (u[i] - 0.5 * noise_level**2 * score) * (si - ti), noise_level * math.sqrt(ti - si))
        torch.testing.assert_close(z_s[i], gaussian.mean + gaussian.stddev * noise[i], atol=1e-12, rtol=0)
        torch.testing.assert_close(log_prob[i], gaussian.log_prob(z_s[i]).mean(), atol=1e-12, rtol=0)


def test_scoring_equals_drawing_and_times_may_differ_within_a_batch():
    z_t, u, noise = (draw(3, 4, 5, seed=seed).float() for seed in range(3))
    t, s = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.6, 0.1])
    z_s, drawn, _ = sde_step(z_t, u, t, s, 0.3, noise=noise)
    assert torch.equal(drawn, sde_step(z_t, u, t, s, 0.3, z_s=z_s)[1])
    for i in range(3):
        _, alone, _ = sde_step(z_t[i : i + 1], u[i : i + 1], t[i], s[i], 0.3, z_s=z_s[i : i + 1])
        assert torch.equal(alone[0], drawn[i])


def test_noise_of_the_last_transition_cannot_reach_what_is_decoded():
    """The decoded x0_hat is fixed before the step's noise is drawn, yet the log-prob depends on it: training on it follows pure noise."""
    z_t, u = draw(1, 64), draw(1, 64, seed=1)
    t, s = time_schedule(8, 3.0)[-2:]
    first, second = (sde_step(z_t, u, t, s, 0.7, noise=draw(1, 64, seed=seed)) for seed in (2, 3))
    assert torch.equal(first[2], second[2])  # x0_hat, which is decoded and rewarded
    assert not torch.equal(first[1], second[1])  # the log-prob that would be trained
    # An earlier transition's noise does reach it, through z_s.
    t, s = time_schedule(8, 3.0)[2:4]
    first, second = (sde_step(z_t, u, t, s, 0.7, noise=draw(1, 64, seed=seed))[0] for seed in (2, 3))
    assert not torch.equal(sde_step(first, u, s, 0.0, 0.0)[2], sde_step(second, u, s, 0.0, 0.0)[2])


# Data whose exact velocity is known: mixtures of Gaussians N(mean_k, std_k^2) with weights w_k, in one dimension.
DATA = {
    "gaussian": (torch.tensor([1.0]), torch.tensor([0.25]), torch.tensor([1.0])),
    "mixture": (torch.tensor([-0.6, 1.0]), torch.tensor([0.4, 0.6]), torch.tensor([0.4, 0.6])),
}


def exact_velocity(z: torch.Tensor, t: torch.Tensor, data: str) -> torch.Tensor:
    """E[eps - x | z_t = z] for z (B, 1), from the posterior over components and, within each, of x."""
    means, stds, weights = (part.double() for part in DATA[data])
    variance = (1 - t) ** 2 * stds**2 + t**2  # of z_t in each component
    log_density = weights.log() - 0.5 * variance.log() - 0.5 * (z - (1 - t) * means) ** 2 / variance
    x_hat = (log_density.softmax(1) * (means + (1 - t) * stds**2 / variance * (z - (1 - t) * means))).sum(1, keepdim=True)
    return (z - x_hat) / t


LEVELS = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)


def sample(data: str, num_steps: int, noise_level: float, num_samples: int = 60_000) -> torch.Tensor:
    """From evenly spaced quantiles of the initial noise, in random order: less sampling error than independent draws have."""
    schedule = time_schedule(num_steps, 1.0).double()  # a shift of 3 needs about twice the steps for the same error
    generator = torch.Generator().manual_seed(1)
    levels = (torch.randperm(num_samples, generator=generator).double()[:, None] + 0.5) / num_samples
    z = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    for step, (t, s) in enumerate(pairwise(schedule)):
        level = noise_level if step < num_steps - 1 else 0.0  # as in training
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        z, _, _ = sde_step(z, exact_velocity(z, t, data), t, s, level, noise=noise)
    return z[:, 0]


def exact_statistics(data: str) -> torch.Tensor:
    """Mean, standard deviation and quantiles of the data."""
    means, stds, weights = (part.double() for part in DATA[data])
    mean = (weights * means).sum()
    std = ((weights * (stds**2 + means**2)).sum() - mean**2).sqrt()
    grid = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
    cdf = sum(w * torch.distributions.Normal(m, sd).cdf(grid) for m, sd, w in zip(means, stds, weights))
    return torch.cat([mean[None], std[None], grid[torch.searchsorted(cdf, LEVELS)]])


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
def test_marginals_converge_to_the_data(data, noise_level):
    """ODE and SDE alike end on the data's distribution: the error, in its standard deviations, falls with T to 2 % at T = 400."""
    expected = exact_statistics(data)
    errors = []
    for num_steps in (12, 25, 50, 400):
        x = sample(data, num_steps, noise_level)
        found = torch.cat([x.mean()[None], x.std()[None], x.quantile(LEVELS)])
        errors.append(((found - expected).abs().max() / expected[1]).item())
    sampling_error = 0.015
    assert errors[0] > 0.05, errors  # there was something to converge from
    assert all(later < max(earlier, sampling_error) for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.02, errors
