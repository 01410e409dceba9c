"""The baselines: losses and advantages as their papers have them, gradients of rewards, short runs, and what baselines/README.md states."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL_RUN, largest_difference, metrics_of, run_script, weights_of
from test_docs import changed_lines

from baselines import ddpo_flux, ddpo_sd, dpo_sd, dpok_sd, refl_sd
from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.errors import UserError
from fastvideo.parallel.distributed import Ranks, keyed_generator
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.hpsv2 import preprocess as hps_preprocess
from scripts.sync_copies import stale_copies
from shapes.checker import MIN_AREA, aesthetic, background_of, taste
from shapes.prompt_files import RL_SPECS
from shapes.world import PIXEL_X, PIXEL_Y, SIZE, render

METHODS = {path.stem: path for path in sorted((REPOSITORY / "baselines").glob("*.py"))}
README = REPOSITORY / "baselines" / "README.md"
CLIP = REPOSITORY / "shapes" / "models" / "clip"


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(method: str):
    return REPOSITORY / "shapes" / "models" / method.partition("_")[2]


# -------------------------------------------------------------------------------------------------------- losses, advantages


@pytest.mark.parametrize("script", [ddpo_sd, ddpo_flux])
def test_ddpo_normalises_over_the_batch_and_knows_no_groups(script):
    rewards, weights = {"a": draw(3, 4, seed=0), "b": 100 + 5 * draw(3, 4, seed=1), "flat": torch.full((3, 4), 0.1)}, {"a": 1.4, "b": 0.7}
    found = script.batch_advantages(rewards, weights | {"flat": 1.0})
    flat = {name: values.flatten().tolist() for name, values in rewards.items()}
    means = {name: math.fsum(values) / 12 for name, values in flat.items()}
    stds = {name: math.sqrt(math.fsum((value - means[name]) ** 2 for value in values) / 11) for name, values in flat.items()}
    expected = [sum(weight * (flat[name][i] - means[name]) / stds[name] for name, weight in weights.items()) for i in range(12)]
    torch.testing.assert_close(found.flatten().double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)
    moved = torch.randperm(12, generator=torch.Generator().manual_seed(0))  # to other prompts
    elsewhere = script.batch_advantages({name: values.flatten()[moved].view(3, 4) for name, values in rewards.items()}, weights)
    torch.testing.assert_close(elsewhere.flatten(), script.batch_advantages(rewards, weights).flatten()[moved], atol=1e-6, rtol=0)
    assert script.AlgorithmFlags.shared_noise is False and script.AlgorithmFlags.timestep_fraction == 1


def test_dpok_learns_from_the_clamped_ratio_alone():
    log_ratio = torch.tensor([0.0, 0.05, -0.05, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    log_prob = (log_ratio - 3).requires_grad_()
    loss, stats = dpok_sd.dpok_loss(log_prob, torch.full_like(log_ratio, -3), advantages, clip_range=0.1)
    terms = [a * max(min(math.exp(r), 1.1), 0.9) for r, a in zip(log_ratio.tolist(), advantages.tolist())]
    assert loss.item() == pytest.approx(-sum(terms) / 7, abs=1e-12)
    loss.backward()
    inside = torch.tensor([1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)  # on whichever side, whatever the advantage
    torch.testing.assert_close(log_prob.grad, torch.where(inside, -advantages * log_ratio.exp() / 7, 0.0))
    assert stats["clip_frac"].item() == pytest.approx(4 / 7)


def test_dpok_centres_rewards_and_measures_noise_predictions():
    rewards = {"a": draw(2, 5, seed=0), "b": draw(2, 5, seed=1)}
    found = dpok_sd.centred_rewards(rewards, {"a": 2.0, "b": -1.0})
    for p in range(2):
        a, b = (rewards[name][p].tolist() for name in ("a", "b"))
        expected = [2 * (x - math.fsum(a) / 5) - (y - math.fsum(b) / 5) for x, y in zip(a, b)]
        assert found[p].tolist() == pytest.approx(expected, abs=1e-6)
    eps, reference = draw(2, 4, 3, 3, seed=2), draw(2, 4, 3, 3, seed=3)
    squares = [(x - y) ** 2 for x, y in zip(eps.flatten().tolist(), reference.flatten().tolist())]
    assert dpok_sd.reference_kl(eps, reference).item() == pytest.approx(math.fsum(squares) / len(squares), abs=1e-12)


def test_refl_loss_stops_at_the_hinge():
    rewards = torch.tensor([0.5, -1.0, 2.5], dtype=torch.float64, requires_grad=True)
    loss, stats = refl_sd.refl_loss(rewards, hinge=2.0)
    assert loss.item() == pytest.approx((1.5 + 3 + 0) / 3) and stats["one_step_reward"].item() == pytest.approx(2 / 3)
    loss.backward()
    assert rewards.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0])


class Network(torch.nn.Module):
    """Predicts weight * z + 0.001 t + the mean of the prompt's embedding."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        return (self.weight * sample + (0.001 * timestep + encoder_hidden_states.mean((1, 2))).view(-1, 1, 1, 1),)


def test_dpo_is_diffusion_dpo_of_the_best_and_the_worst():
    """From clean samples and advantages to the loss, against the paper's formula in plain numbers, for every pair and step."""
    p, G, K, beta, latent = 2, 3, 4, 40.0, (4, 3, 3)
    advantages = torch.tensor([[0.1, -2.0, 1.5], [0.3, 0.2, -0.1]])
    x0, embeds = draw(p * G, *latent, seed=0), draw(p, 5, 6, seed=1)
    alpha_bar = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
    schedule = dpo_sd.Schedule(torch.arange(1000), alpha_bar, torch.ones(1000), predicts_v=False)
    run = SimpleNamespace(
        args=SimpleNamespace(steps_per_pair=K), generators=lambda purpose, keys: [keyed_generator(0, purpose, *key) for key in keys]
    )
    pairs = dpo_sd.noised_pairs(x0, advantages, [0, 1], schedule, run)
    assert len(set(pairs["step"].flatten().tolist())) > K  # each pair has its own

    policy, initial = Network(0.5), Network(0.3)
    every = torch.cartesian_prod(torch.arange(p), torch.arange(K))
    chosen, cond = dpo_sd.pick(pairs, {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "guidance_scale": embeds}, *every.T, 1)
    errors, reference = (dpo_sd.noise_errors(network, chosen, cond, schedule) for network in (policy, initial))
    loss, stats = dpo_sd.dpo_loss(errors, reference.detach(), chosen["told_apart"], beta)

    losses, best, worst = [], [2, 0], [1, 2]
    for pair, k in every.tolist():
        step, eps, text = pairs["step"][pair, k].item(), pairs["noise"][pair, k], embeds[pair].mean().item()
        a = alpha_bar[step].item()
        gain = []
        for sample in (best[pair], worst[pair]):
            z = math.sqrt(a) * x0[pair * G + sample] + math.sqrt(1 - a) * eps
            ours, theirs = ((eps - (weight * z + 0.001 * step + text)).square().mean().item() for weight in (0.5, 0.3))
            gain.append(ours - theirs)
        losses.append(math.log1p(math.exp(beta / 2 * (gain[0] - gain[1]))))
    assert loss.item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-4)
    assert 0 <= stats["accuracy"] <= 1
    # Gradient descent makes the better sample's noise easier to predict than the worse one's.
    loss.backward()
    better, worse = dpo_sd.noise_errors(Network(0.5 - 1e-4 * policy.weight.grad.sign().item()), chosen, cond, schedule).mean(0)
    assert better - worse < (errors[:, 0] - errors[:, 1]).mean()


def test_dpo_learns_nothing_from_equal_rewards():
    network, schedule = Network(0.5), dpo_sd.Schedule(torch.arange(10), torch.linspace(0.9, 0.1, 10), torch.ones(10), predicts_v=False)
    run = SimpleNamespace(
        args=SimpleNamespace(steps_per_pair=3), generators=lambda purpose, keys: [keyed_generator(0, purpose, *key) for key in keys]
    )
    pairs = dpo_sd.noised_pairs(draw(3, 4, 3, 3, seed=0), torch.zeros(1, 3), [0], schedule, run)
    chosen, cond = dpo_sd.pick(pairs, {"prompt_embeds": draw(1, 5, 6, seed=1)}, torch.zeros(3, dtype=torch.long), torch.arange(3), 1)
    errors = dpo_sd.noise_errors(network, chosen, cond, schedule)
    dpo_sd.dpo_loss(errors, torch.zeros(3, 2), chosen["told_apart"], 5000.0)[0].backward()
    assert network.weight.grad == 0


# --------------------------------------------------------------------------------------------------------- gradients of rewards


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Drawings, some with noise, and noise alone: (72, 3, 32, 32) in [0, 1], float32."""
    rng = np.random.default_rng(0)
    drawn = render(RL_SPECS[:32], rng).astype(np.float32)
    noisy = np.clip(drawn + rng.normal(0, 0.1, drawn.shape), 0, 1)
    return np.concatenate([drawn, noisy, rng.random((6, 3, SIZE, SIZE)), np.zeros((2, 3, SIZE, SIZE))]).astype(np.float32)


def test_the_taste_is_its_formula(pictures):
    """As NumPy computes it in float64."""
    images = pictures.astype(np.float64)
    background = background_of(images)
    objectness = np.clip((np.sqrt(((images - background) ** 2).sum(1)) - 0.2) / 0.2, 0, 1)
    total = objectness.sum((1, 2)) + 1e-6
    some = np.clip(total / MIN_AREA, 0, 1)
    size = np.exp(-(((objectness.mean((1, 2)) - 0.35) / 0.15) ** 2))
    deviation = np.abs(images - background).mean(1) * (1 - objectness)
    clean = np.exp(-20 * deviation.sum((1, 2)) / ((1 - objectness).sum((1, 2)) + MIN_AREA))
    saturation = (images.max(1) - images.min(1)) / (images.max(1) + 1e-3)
    vivid = some * (saturation * objectness).sum((1, 2)) / total
    off_centre = [(objectness * pixel).sum((1, 2)) / total - SIZE / 2 for pixel in (PIXEL_X, PIXEL_Y)]
    centred = some * np.exp(-((np.hypot(*off_centre) / 6) ** 2))
    np.testing.assert_allclose(aesthetic(pictures), 0.3 * size + 0.25 * clean + 0.25 * vivid + 0.2 * centred, atol=1e-6)


def test_the_taste_has_its_gradient(pictures):
    """Beside central differences in float64; and none that is not finite, where a pixel is the background exactly."""
    images = torch.from_numpy(pictures[30:34]).double().requires_grad_()  # two of each kind
    (gradient,) = torch.autograd.grad(taste(images).sum(), images)
    for seed in range(5):
        direction = draw(*images.shape, seed=seed)
        step = 1e-6 * direction
        difference = (taste(images + step).sum() - taste(images - step).sum()).item() / 2e-6
        # At a kink, of which drawings without noise have many, a difference is the mean of both sides.
        assert (gradient * direction)[2:].sum().item() == pytest.approx(
            ((taste(images + step) - taste(images - step))[2:].sum() / 2e-6).item(), rel=1e-4
        )
        assert math.isfinite(difference)
    media = torch.from_numpy(pictures).mul(2).sub(1).requires_grad_()
    rewards = load_rewards(parse_rewards(["aesthetic"]), torch.device("cpu"))
    scores = score(rewards, media, [{"prompt": ""}] * len(media), with_gradient=True)["aesthetic"]
    (gradient,) = torch.autograd.grad(scores.sum(), media)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().sum(1) > 0)[:64].all()


@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=str)
def test_clip_has_its_gradient_past_the_rounding_to_8_bits(size):
    """Beside differences of whole levels, which are what the reward, constant in between, can tell apart."""
    rewards, rows = (
        load_rewards(parse_rewards([f"clip={CLIP}"]), torch.device("cpu")),
        [{"prompt": "a red circle"}, {"prompt": "a blue square"}],
    )
    levels = torch.randint(64, 192, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    media = (levels / 127.5 - 1).requires_grad_()
    scores = score(rewards, media, rows, with_gradient=True)["clip"]
    assert torch.equal(scores.detach(), score(rewards, media.detach(), rows)["clip"])
    (gradient,) = torch.autograd.grad(scores.sum(), media)
    for seed in range(3):
        noise = gradient.sign() * (draw(*media.shape, seed=seed).abs() > 2.3)  # of a few pixels, in which the cosine is almost linear
        ahead, behind = (score(rewards, (levels + sign * 4 * noise.float()) / 127.5 - 1, rows)["clip"].sum() for sign in (1, -1))
        assert (gradient * noise).sum().item() * 8 / 127.5 == pytest.approx((ahead - behind).item(), rel=0.1)


def test_hpsv2s_pictures_have_a_gradient():
    images = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).requires_grad_()
    (gradient,) = torch.autograd.grad(hps_preprocess(images, 28).square().sum(), images)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("reward", ["shapes", "shapes_strict", "aesthetic@0.5", f"clip={CLIP}@0.3"])
def test_a_reward_without_gradient_is_refused(reward):
    rewards, media = load_rewards(parse_rewards([reward]), torch.device("cpu")), torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    with pytest.raises(UserError, match="has no gradient to learn from: clip, hpsv2, pickscore and aesthetic have one"):
        score(rewards, media, [{"prompt": "a red circle"}], with_gradient=True)


def test_a_users_own_reward_has_its_gradient(tmp_path):
    (tmp_path / "brightness.py").write_text("def brightness(media, rows):\n    return media.square().mean((1, 2, 3))\n")
    rewards = load_rewards(parse_rewards([f"{tmp_path / 'brightness.py'}:brightness"]), torch.device("cpu"))
    media = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (scores,) = score(rewards, media, [{"prompt": ""}] * 2, with_gradient=True).values()
    (gradient,) = torch.autograd.grad(scores.sum(), media)
    torch.testing.assert_close(gradient, 2 * media.detach() / 192)


# ----------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory, prompt_file, cache) -> dict:
    """Caches of ten prompts, by the model they are for."""
    folder = tmp_path_factory.mktemp("sd")
    flags = {"--model": model_of("x_sd"), "--prompts": prompt_file, "--output_dir": folder / "cache"}
    result = run_script(REPOSITORY / "preprocess" / "embed_sd.py", flags, log=folder / "log")
    assert result.returncode == 0, result.stderr
    return {"sd": folder / "cache", "flux": cache}


def flags_of(method: str, embeddings: dict, run) -> dict:
    """Of a run of two iterations."""
    family = method.partition("_")[2]
    flags = {"--model": model_of(method), "--embeddings": embeddings[family], "--output_dir": run} | SMALL_RUN
    flags |= {"--iterations": 2, "--checkpoint_every": 1} | ({"--guidance_scale": 2, "--noise_level": 1} if family == "sd" else {})
    return flags | {"refl_sd": {"--last_steps": 2}, "dpo_sd": {"--updates_per_iteration": 1}}.get(method, {})


LOGGED = {  # besides the loss
    "ddpo_sd": {"ratio_mean", "ratio_max_dev", "approx_kl", "clip_frac"},
    "ddpo_flux": {"ratio_mean", "ratio_max_dev", "approx_kl", "clip_frac"},
    "dpok_sd": {"ratio_mean", "ratio_max_dev", "approx_kl", "clip_frac", "kl"},
    "refl_sd": {"one_step_reward"},
    "dpo_sd": {"accuracy"},
}


@pytest.fixture(scope="module")
def runs(embeddings, tmp_path_factory) -> dict:
    return {method: tmp_path_factory.mktemp(method) / "run" for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_moves_the_weights_and_is_logged(method, embeddings, runs):
    result = run_script(METHODS[method], flags_of(method, embeddings, runs[method]), log=runs[method].with_name("log"))
    assert result.returncode == 0, result.stderr
    network = "unet" if method.endswith("sd") else "transformer"
    exported = weights_of(runs[method] / "export" / network)
    assert 1e-5 < largest_difference(exported, weights_of(model_of(method) / network)) < 0.1
    assert json.loads((runs[method] / "manifest.json").read_text())["script"] == f"{method}.py"
    for row in metrics_of(runs[method]):
        policy = {key.removeprefix("policy/") for key in row if key.startswith("policy/")}
        assert policy == {"loss", "grad_norm", "lr"} | LOGGED[method]
        assert row["policy/grad_norm"] > 0 and math.isfinite(row["policy/loss"]) and row["samples"] == 8 * row["iteration"]
        assert row["reward/aesthetic_std"] > 0 and ("advantage/abs_mean" in row) == (method != "refl_sd")
    first = metrics_of(runs[method])[0]
    if "ratio_max_dev" in LOGGED[method]:
        assert first["policy/ratio_max_dev"] < 2e-6
    if method == "dpok_sd":  # two updates: the policy is the initial one in the first
        assert 0 < first["policy/kl"] < metrics_of(runs[method])[1]["policy/kl"]
    if method == "dpo_sd":
        assert first["policy/loss"] == pytest.approx(math.log(2), abs=1e-5) and first["policy/accuracy"] < 0.6


def test_a_resumed_run_is_the_same_bit_for_bit(embeddings, runs, tmp_path):
    """From its first checkpoint, against the policy that was initial before."""
    method = "dpo_sd"
    shutil.copytree(runs[method], tmp_path / "run", ignore=shutil.ignore_patterns("iteration_000002", "export", "rewards.png", "lock"))
    (tmp_path / "run" / "checkpoints" / "latest").write_text("iteration_000001")
    result = run_script(METHODS[method], flags_of(method, embeddings, tmp_path / "run"), log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert metrics_of(tmp_path / "run") == metrics_of(runs[method])
    again, before = (weights_of(run / "export" / "unet") for run in (tmp_path / "run", runs[method]))
    assert all(again[name].equal(before[name]) for name in before)


def test_refl_wants_rewards_with_gradients(embeddings, tmp_path):
    flags = flags_of("refl_sd", embeddings, tmp_path / "run") | {"--rewards": "shapes", "--held_out_rewards": "aesthetic"}
    result = run_script(METHODS["refl_sd"], flags, log=tmp_path / "log")
    assert result.returncode == 2 and "error: reward 'shapes' has no gradient to learn from" in result.stderr
    assert not (tmp_path / "run").exists()


def test_refls_gradient_is_that_of_one_step(embeddings, tmp_path):
    """Of the step that was drawn, from where the sample stood then, by the formula of x0_hat; not through the steps before or after."""
    args = refl_sd.Args(
        model=model_of("x_sd"),
        embeddings=embeddings["sd"],
        output_dir=tmp_path,
        rewards=("aesthetic",),
        sampling_steps=4,
        last_steps=2,
        height=32,
        width=32,
    )
    unet, vae = refl_sd.load_models(args, torch.float32, Ranks(0, 1, torch.device("cpu")))
    cond = refl_sd.load_cond(EmbeddingCache(embeddings["sd"]), [0, 1], unet, vae, args)
    schedule, drawn = refl_sd.time_schedule(4, args.model), torch.tensor([[3], [2]])
    z_1 = draw(2, *refl_sd.latent_shape(unet, vae, args), seed=0).float()
    noise = [[keyed_generator(0, "noise", i) for i in range(2)] for _ in range(2)]
    kept, _ = refl_sd.rollout(unet, cond, z_1, schedule, [1.0, 1.0, 1.0, 0.0], noise[0], drawn)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    run = SimpleNamespace(weights={"aesthetic": 1.0}, rewards=load_rewards(parse_rewards(args.rewards), torch.device("cpu")))
    rows = [{"prompt": ""}] * 2

    def gradient(x0_hat: torch.Tensor) -> torch.Tensor:
        rewards = refl_sd.weighted_rewards(refl_sd.decode(vae, x0_hat, args), rows, run)
        found = torch.autograd.grad(refl_sd.refl_loss(rewards, 2.0)[0], weights, allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    transitions, pair_cond = refl_sd.pick(kept, cond, torch.arange(2), torch.zeros(2, dtype=torch.long), 1)
    found = gradient(refl_sd.predict_x0(unet, transitions, pair_cond, schedule))

    def sampled(with_gradient: bool) -> torch.Tensor:
        """x0_hat at the drawn steps, by sampling again, with gradients through all steps or through the last of them alone."""
        z, seen = z_1, [None, None]
        for step, (a, b) in enumerate(zip(schedule.alpha_bar_t, schedule.alpha_bar_s)):
            eps = refl_sd.predict(unet, z, torch.full((2,), step), schedule, cond)
            x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
            seen = [x0[i] if drawn[i] == step else seen[i] for i in range(2)]
            std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt() if step < 3 else torch.tensor(0.0)
            z = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
            z = z + std * torch.stack([torch.randn(z.shape[1:], generator=g) for g in noise[1]]) if step < 3 else z
            z = z if with_gradient else z.detach()
        return torch.stack(seen)

    everything = torch.get_rng_state(), [g.get_state() for g in noise[1]]
    one = gradient(sampled(False))
    for generator, state in zip(noise[1], everything[1]):
        generator.set_state(state)
    torch.testing.assert_close(found, one, atol=1e-6 * one.abs().max().item(), rtol=1e-3)
    assert (gradient(sampled(True)) - found).norm() > 0.1 * found.norm()


# ------------------------------------------------------------------------------------------------------- copies, documentation


def test_a_change_of_the_original_reaches_the_baselines(tmp_path):
    """By way of the script that they copy, of functions and of flags."""
    (tmp_path / "baselines").mkdir()
    for path in [*REPOSITORY.glob("train_grpo_*.py"), *METHODS.values()]:
        shutil.copy(path, tmp_path / path.relative_to(REPOSITORY))
    flux, sd = tmp_path / "train_grpo_flux.py", tmp_path / "train_grpo_sd.py"
    flux.write_text(flux.read_text().replace("share = len(drawn) //", "share = +len(drawn) //"))
    sd.write_text(sd.read_text().replace("guidance_scale: float = 5.0", "guidance_scale: float = 7.5"))
    stale = stale_copies(tmp_path)
    stale_copies(tmp_path, write=True)
    assert stale_copies(tmp_path) == []
    for method in METHODS:
        text = (tmp_path / "baselines" / f"{method}.py").read_text()
        assert "share = +len(drawn) //" in text
        assert ("guidance_scale: float = 7.5" in text) == method.endswith("sd")
        assert method.endswith("flux") or f"baselines/{method}.py: ModelFlags differs from the one in train_grpo_sd.py" in stale


@pytest.mark.parametrize("method", METHODS)
def test_the_readme_states_how_many_lines_differ(method):
    parent = f"train_grpo_{method.partition('_')[2]}.py"
    row = re.search(rf"^\| `{method}.py` \|.*\| (\d+) of `{parent}` \|", README.read_text(), re.MULTILINE)
    assert int(row[1]) == changed_lines(parent, f"baselines/{method}.py")


# ----------------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_same_training(method, embeddings, tmp_path):
    """Up to rounding, with half the prompts each."""
    rows = {}
    for processes in (1, 2):
        flags = flags_of(method, embeddings, tmp_path / str(processes))
        result = run_script(METHODS[method], flags, processes=processes, log=tmp_path / f"{processes}.log")
        assert result.returncode == 0, result.stderr
        rows[processes] = metrics_of(tmp_path / str(processes))
    for one, two in zip(rows[1], rows[2], strict=True):
        for key in ("reward/aesthetic_mean", "policy/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4 if one["iteration"] == 1 else 1e-3), (one["iteration"], key)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method.endswith("sd")])
def test_the_taste_rises(method, embeddings, tmp_path):
    """By more than the mix of prompts moves an iteration's mean, which is about 0.01."""
    flags = flags_of(method, embeddings, tmp_path / "run") | {"--iterations": 16, "--prompts_per_iteration": 4, "--num_generations": 12}
    flags |= {"--updates_per_iteration": 1, "--learning_rate": 3e-4, "--lr_warmup_steps": 2, "--checkpoint_every": 100, "--zero_stage": 1}
    flags |= {"--rollout_batch_size": 48, "--micro_batch_size": 48} | ({"--steps_per_pair": 64} if method == "dpo_sd" else {})
    result = run_script(METHODS[method], flags, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    means = [row["reward/aesthetic_mean"] for row in metrics_of(tmp_path / "run")]
    before, after = sum(means[:4]) / 4, sum(means[-4:]) / 4
    print(f"{method}: {before:.3f} to {after:.3f}")
    assert after > before + 0.03
