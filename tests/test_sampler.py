"""The sampling SDE: exact densities, the Euler limit, noise schedules, marginals, and why the last transition is not trained."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import MODEL
from diffusers import FlowMatchEulerDiscreteScheduler

from train_grpo_flux import Args, noise_levels, sde_step, time_schedule


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


def epsilon(noise_schedule: str, t: float, s: float, noise_level: float) -> float:
    """What each schedule is meant to be; the first step of Flow-GRPO, from t = 1, adds noise of standard deviation noise_level."""
    return (
        noise_level * {"constant": 1, "decay": math.sqrt(t), "flow_grpo": math.sqrt(t / (1 - t) if t < 1 else 1 / (1 - s))}[noise_schedule]
    )


SCHEDULES = ["constant", "decay", "flow_grpo"]


def arguments(**flags) -> Args:
    return Args(**{"model": MODEL, "embeddings": MODEL, "output_dir": MODEL, "rewards": ("aesthetic",)} | flags)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_follow_the_schedule_in_the_stochastic_steps(noise_schedule, shift):
    args = arguments(sampling_steps=8, shift=shift, noise_level=0.7, noise_schedule=noise_schedule)
    times = [shift * t / (1 + (shift - 1) * t) for t in (1 - step / 8 for step in range(9))]
    expected = [epsilon(noise_schedule, t, s, 0.7) for t, s in pairwise(times)]
    levels = noise_levels(time_schedule(8, shift), args)
    assert levels[:-1] == pytest.approx(expected[:-1], rel=1e-6) and levels[-1] == 0
    args.sde_window = (2, 3)
    assert noise_levels(time_schedule(8, shift), args) == [0, 0, *levels[2:5], 0, 0, 0]
    if noise_schedule == "constant":
        assert set(levels[:-1]) == {0.7}
    else:  # neither may be mistaken for the other, or for none
        assert all(later < earlier for earlier, later in pairwise(levels))


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_each_transition_of_a_batch_is_scored_with_its_own_noise_level(noise_schedule):
    """As drawn one by one, and as torch's own density in float64 has it: with one level for all it would not be."""
    schedule = time_schedule(6, 3.0).double()
    levels = noise_levels(schedule, arguments(sampling_steps=6, noise_level=0.6, noise_schedule=noise_schedule))
    z_t, u, noise = (draw(5, 4, 5, seed=seed) for seed in range(3))
    t, s, own = schedule[:5], schedule[1:6], torch.tensor(levels[:5], dtype=torch.float64)
    drawn = [sde_step(z_t[[i]], u[[i]], t[i], s[i], levels[i], noise=noise[[i]]) for i in range(5)]
    z_s = torch.cat([z for z, _, _ in drawn])
    _, log_prob, _ = sde_step(z_t, u, t, s, own, z_s=z_s)
    assert torch.equal(log_prob, torch.cat([one for _, one, _ in drawn]))
    for i in range(5):
        level = epsilon(noise_schedule, t[i].item(), s[i].item(), 0.6)
        score = -(z_t[i] - (1 - t[i]) * (z_t[i] - t[i] * u[i])) / t[i] ** 2
        gaussian = torch.distributions.Normal(z_t[i] + (u[i] - level**2 / 2 * score) * (s[i] - t[i]), level * (t[i] - s[i]).sqrt())
        torch.testing.assert_close(log_prob[i], gaussian.log_prob(z_s[i]).mean(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_a_noise_level_that_breaks_the_sampler_is_told(noise_schedule, capsys):
    """By the worst of the stochastic steps, each with its own level."""
    times = [3 * t / (1 + 2 * t) for t in (1 - step / 8 for step in range(8))]  # the last transition is never stochastic
    worst = max(epsilon(noise_schedule, t, s, 1.0) ** 2 * (t - s) / (2 * t**2) for t, s in pairwise(times))
    arguments(sampling_steps=8, noise_level=math.sqrt(0.45 / worst), noise_schedule=noise_schedule)
    assert capsys.readouterr().err == ""
    arguments(sampling_steps=8, noise_level=math.sqrt(0.6 / worst), noise_schedule=noise_schedule)
    assert (
        "noise_level^2 * delta / (2 t^2) reaches 0.60, and sampling breaks down towards 1: lower --noise_level" in capsys.readouterr().err
    )


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


def final_moments(num_steps: int, levels: list[float]) -> torch.Tensor:
    """Mean and standard deviation of samples where the data is N(1, 0.25^2): without sampling error, since every transition is affine."""
    mean, variance = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    for level, (t, s) in zip(levels, pairwise(time_schedule(num_steps, 1.0).double())):
        z = torch.stack([mean, mean + 1]).view(2, 1)
        u = exact_velocity(z, t, "gaussian")
        z_s, drawn = (sde_step(z, u, t, s, level, noise=torch.full_like(z, noise))[0] for noise in (0, 1))
        mean, variance = z_s[0, 0], (z_s[1, 0] - z_s[0, 0]) ** 2 * variance + (drawn - z_s)[0, 0] ** 2
    return torch.stack([mean, variance.sqrt()])


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_the_sdes_marginal_becomes_the_odes_whatever_the_schedule(noise_schedule):
    """Their difference, in the data's standard deviations, falls with T to 1 % at T = 800; and at no T did they have to be equal."""
    differences = []
    for num_steps in (50, 100, 200, 400, 800):
        args = arguments(sampling_steps=num_steps, noise_level=0.7, noise_schedule=noise_schedule)
        levels = noise_levels(time_schedule(num_steps, 1.0), args)
        stochastic, euler = final_moments(num_steps, levels), final_moments(num_steps, [0.0] * num_steps)
        differences.append((stochastic - euler).abs().max().item() / 0.25)
    assert all(later < 0.7 * earlier for earlier, later in pairwise(differences)), differences
    assert differences[0] > 0.01 > differences[-1], differences
