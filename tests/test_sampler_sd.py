"""Stable Diffusion's sampling SDE: diffusers' DDIM at every noise level and schedule, exact densities, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from fastvideo.errors import UserError
from train_grpo_sd import Args, Schedule, noise_levels, predict, sde_step, time_schedule

BETAS = {
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "trained_betas": {"trained_betas": torch.linspace(0.03, 0.14, 1000).square().tolist()},
}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def save_scheduler(folder, **settings) -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False, **settings)
    scheduler.save_pretrained(folder / "scheduler")
    return scheduler


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_every_transition_is_ddims(tmp_path, betas, spacing, set_alpha_to_one, num_steps):
    settings = {"timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one, "steps_offset": int(spacing == "leading")}
    scheduler = save_scheduler(tmp_path, **BETAS[betas], **settings)
    scheduler.set_timesteps(num_steps)
    schedule = time_schedule(num_steps, tmp_path)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    z_t, eps, noise = (draw(2, 4, 3, 3, seed=seed) for seed in range(3))
    for step, t in enumerate(schedule.timesteps):
        alpha_bars = schedule.alpha_bar_t[step], schedule.alpha_bar_s[step]
        for noise_level in (0.0, 0.3, 1.0):
            mean = scheduler.step(eps, t, z_t, eta=noise_level, variance_noise=torch.zeros_like(noise)).prev_sample
            drawn = scheduler.step(eps, t, z_t, eta=noise_level, variance_noise=noise).prev_sample
            ours = sde_step(z_t, eps, *alpha_bars, noise_level, noise=torch.zeros_like(noise))[0]
            torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
            with_noise, _, x0_hat = sde_step(z_t, eps, *alpha_bars, noise_level, noise=noise)
            torch.testing.assert_close(with_noise - ours, drawn - mean, atol=1e-6, rtol=0)  # std
            torch.testing.assert_close(x0_hat, scheduler.step(eps, t, z_t).pred_original_sample, atol=1e-6, rtol=1e-6)


def test_log_prob_is_the_gaussians_density():
    z_t, eps, noise = (draw(3, 4, 5, seed=seed) for seed in range(3))
    alpha_bar_t, alpha_bar_s = torch.tensor([0.01, 0.3, 0.9]).double(), torch.tensor([0.02, 0.4, 0.95]).double()
    z_s, log_prob, _ = sde_step(z_t, eps, alpha_bar_t, alpha_bar_s, 0.7, noise=noise)
    assert torch.equal(log_prob, sde_step(z_t, eps, alpha_bar_t, alpha_bar_s, 0.7, z_s=z_s)[1])
    for i, (a, b) in enumerate(zip(alpha_bar_t.tolist(), alpha_bar_s.tolist())):
        std = 0.7 * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = (z_t[i] - math.sqrt(1 - a) * eps[i]) / math.sqrt(a)
        gaussian = torch.distributions.Normal(math.sqrt(b) * x + math.sqrt(1 - b - std**2) * eps[i], std)
        torch.testing.assert_close(z_s[i], gaussian.mean + std * noise[i], atol=1e-10, rtol=0)
        torch.testing.assert_close(log_prob[i], gaussian.log_prob(z_s[i]).mean(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_noise_levels_are_ddims_eta_or_fall_with_the_time(tmp_path, spacing):
    """And a transition's density is that of its own level: diffusers' DDIM with this eta draws what has it."""
    scheduler = save_scheduler(tmp_path, **BETAS["scaled_linear"], timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    scheduler.set_timesteps(8)
    schedule, flags = time_schedule(8, tmp_path), {"model": tmp_path, "embeddings": tmp_path, "output_dir": tmp_path}
    args = Args(**flags, rewards=("aesthetic",), sampling_steps=8, noise_level=0.8, noise_schedule="decay")
    first = {"leading": 876, "trailing": 999}[spacing]
    levels = noise_levels(schedule, args)
    assert levels[:-1] == pytest.approx([0.8 * math.sqrt((first - 125 * step) / first) for step in range(7)], rel=1e-6) and levels[-1] == 0
    z_t, eps, noise = (draw(7, 4, 3, 3, seed=seed) for seed in range(3))
    steps = zip(z_t, eps, noise, scheduler.timesteps, levels)
    z_s = torch.stack([scheduler.step(e, t, z, eta=level, variance_noise=n).prev_sample for z, e, n, t, level in steps])
    alpha_bars = schedule.alpha_bar_t[:7].double(), schedule.alpha_bar_s[:7].double()
    _, log_prob, _ = sde_step(z_t, eps, *alpha_bars, torch.tensor(levels[:7]), z_s=z_s)
    std = torch.tensor(levels[:7]).double() * ((1 - alpha_bars[1]) / (1 - alpha_bars[0]) * (1 - alpha_bars[0] / alpha_bars[1])).sqrt()
    expected = torch.distributions.Normal(0, std.view(7, 1, 1, 1)).log_prob(std.view(7, 1, 1, 1) * noise)
    torch.testing.assert_close(log_prob, expected.flatten(1).mean(1), atol=1e-4, rtol=0)  # diffusers' coefficients are float32
    args.sde_window = (1, 2)
    assert noise_levels(schedule, args) == [0, *levels[1:3], 0, 0, 0, 0, 0]
    args.noise_schedule = "constant"
    assert noise_levels(schedule, args) == [0, 0.8, 0.8, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
def test_the_marginals_converge_to_the_data(tmp_path, noise_level):
    """Data N(1, 0.25^2), whose exact eps is known: the error, in its standard deviations, falls with T to 3 % at all 1,000 steps."""
    save_scheduler(tmp_path, **BETAS["scaled_linear"], set_alpha_to_one=True)
    errors = []
    for num_steps in (250, 500, 1000):
        schedule = time_schedule(num_steps, tmp_path)
        first = schedule.alpha_bar_t[0].double()  # these betas leave some signal at the first step
        mean, variance = first.sqrt(), first * 0.25**2 + 1 - first  # of z_t, which stays Gaussian: every transition is linear
        for step, (a, b) in enumerate(zip(schedule.alpha_bar_t.double(), schedule.alpha_bar_s.double())):
            z = torch.stack([mean, mean + 1]).view(2, 1)
            eps = (1 - a).sqrt() * (z - a.sqrt()) / (a * 0.25**2 + 1 - a)  # E[eps | z_t]
            level = noise_level if step < num_steps - 1 else 0.0
            z_s, drawn = (sde_step(z, eps, a, b, level, noise=torch.full_like(z, noise))[0] for noise in (0, 1))
            mean, slope, std = z_s[0, 0], z_s[1, 0] - z_s[0, 0], (drawn - z_s)[0, 0]
            variance = slope**2 * variance + std**2
        errors.append(max(abs(mean.item() - 1), abs(variance.sqrt().item() - 0.25)) / 0.25)
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.03, errors


class FakeUNet(torch.nn.Module):
    """Answers with a number for each prompt's embedding, and counts its calls."""

    calls = 0

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        self.calls += 1
        assert len(sample) == len(timestep) == len(encoder_hidden_states)
        return (sample * 0 + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1),)


def test_guidance_is_one_batched_call():
    schedule = Schedule(torch.tensor([900, 400]), torch.tensor([0.1, 0.6]), torch.tensor([0.6, 1.0]), predicts_v=False)
    z_t, step, unet = draw(2, 4, 3, 3, seed=0).float(), torch.tensor([0, 1]), FakeUNet()
    cond = {"prompt_embeds": torch.full((2, 5, 6), 3.0)}
    assert torch.all(predict(unet, z_t, step, schedule, cond) == 3)
    cond |= {"negative_prompt_embeds": torch.full((2, 5, 6), 1.0), "guidance_scale": torch.full((2, 1, 1, 1), 5.0)}
    assert torch.all(predict(unet, z_t, step, schedule, cond) == 1 + 5 * (3 - 1))
    assert unet.calls == 2


def test_v_prediction_becomes_epsilon(tmp_path):
    scheduler = save_scheduler(tmp_path, **BETAS["scaled_linear"], prediction_type="v_prediction", set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    schedule = time_schedule(10, tmp_path)
    z_t = draw(2, 4, 3, 3, seed=0)
    cond = {"prompt_embeds": torch.full((2, 5, 6), 0.3).double()}
    for step, t in enumerate(schedule.timesteps):
        eps = predict(FakeUNet(), z_t, torch.full((2,), step), schedule, cond)
        z_s, _, _ = sde_step(z_t, eps, schedule.alpha_bar_t[step], schedule.alpha_bar_s[step], 0.0)
        torch.testing.assert_close(z_s, scheduler.step(torch.full_like(z_t, 0.3), t, z_t).prev_sample, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"prediction_type": "sample"}, 10, "has prediction_type 'sample', but epsilon and v_prediction"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, "leaves no signal at the first step"),
        ({}, 1001, "gives no DDIM schedule of --sampling_steps 1001"),
        ({}, 600, "--sampling_steps 600 does not fit the 1000 steps of .*: use at most 500"),
        ({"steps_offset": 1}, 1000, "--sampling_steps 1000 does not fit"),
    ],
)
def test_schedules_that_are_refused(tmp_path, settings, steps, message):
    save_scheduler(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        time_schedule(steps, tmp_path)


def test_a_missing_scheduler_is_refused(tmp_path):
    with pytest.raises(UserError, match="gives no DDIM schedule"):
        time_schedule(10, tmp_path)
