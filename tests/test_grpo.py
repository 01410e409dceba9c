"""The pieces of Algorithm 1 that need no network: advantages, selection, the loss, the order of prompts."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, tiny_model

import train_grpo_flux
from fastvideo.embeddings.prompts import shuffled_prompts
from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.parallel import distributed
from fastvideo.parallel.distributed import Ranks, keyed_generator
from fastvideo.runs.guards import check_ratio
from fastvideo.runs.run import Run
from train_grpo_flux import best_of_n, group_advantages, grpo_loss, reference_kl, sde_step, select_timesteps


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7, 1e6, 1e-12, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_exactly_zero_advantage(value, dtype):
    rewards = torch.full((2, 12), value, dtype=dtype)
    assert torch.equal(group_advantages({"r": rewards}, {"r": 1.0}), torch.zeros(2, 12))


def test_advantages_are_normalised_in_each_group_then_summed_with_weights():
    a, b = torch.rand(3, 8), 100 * torch.rand(3, 8)
    expected = sum(w * (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True) for r, w in ((a.double(), 1.4), (b.double(), 0.7)))
    torch.testing.assert_close(group_advantages({"a": a, "b": b}, {"a": 1.4, "b": 0.7}), expected.float(), atol=1e-5, rtol=0)
    # One prompt's rewards do not touch another's advantages.
    changed = torch.cat([a[:1], 10 * a[1:]])
    assert torch.equal(group_advantages({"a": a}, {"a": 1.0})[0], group_advantages({"a": changed}, {"a": 1.0})[0])


def test_a_flat_reward_leaves_the_others_advantages_alone():
    a, flat = torch.rand(2, 6), torch.full((2, 6), 0.1)
    assert torch.equal(group_advantages({"a": a, "flat": flat}, {"a": 1.0, "flat": 1.0}), group_advantages({"a": a}, {"a": 1.0}))


def test_best_of_n_keeps_the_best_and_the_worst_in_sample_order():
    advantages = torch.tensor([[0.5, -2.0, 3.0, 0.0, 1.0, -1.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    assert best_of_n(advantages, 4).tolist() == [[1, 2, 4, 5], [0, 1, 4, 5]]
    assert best_of_n(advantages, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert best_of_n(torch.zeros(1, 5), 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("num_steps, fraction, count", [(24, 0.6, 15), (5, 0.6, 3), (7, 1.0, 7), (10, 0.1, 1), (3, 0.01, 1), (10, 0.3, 3)])
def test_timesteps_are_distinct_and_their_number_is_rounded_up(num_steps, fraction, count):
    generators = [keyed_generator(0, "timesteps", i) for i in range(50)]
    chosen = select_timesteps(generators, num_steps, fraction)
    assert chosen.shape == (50, count)
    assert all(len(set(row)) == count and set(row) <= set(range(num_steps)) for row in chosen.tolist())
    if count < num_steps:
        assert len({tuple(row) for row in chosen.tolist()}) > 1  # each sample has its own
        assert set(chosen.flatten().tolist()) == set(range(num_steps))
    assert select_timesteps(generators, num_steps, fraction, "first")[0].tolist() == list(range(count))
    assert select_timesteps(generators, num_steps, fraction, "last")[0].tolist() == list(range(num_steps - count, num_steps))


# The paper's choices of section 3.6, as flags, and how many of 20 stochastic steps, and which, they are for each sample (None: any).
CHOICES = {
    "the first 30 %": ("first", 0.3, 6, [0, 1, 2, 3, 4, 5]),
    "a random 30 %": ("random", 0.3, 6, None),
    "the last 40 %": ("last", 0.4, 8, [12, 13, 14, 15, 16, 17, 18, 19]),
    "a random 60 %": ("random", 0.6, 12, None),
    "all": ("random", 1.0, 20, list(range(20))),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_papers_choices_of_timesteps_can_be_said(name, choice):
    """As flags of each script; "first" is noise, "last" the picture, and of a random choice every step gets its share."""
    script, (selection, fraction, count, steps) = importlib.import_module(f"train_grpo_{name}"), CHOICES[choice]
    flags = {"model": tiny_model(name), "embeddings": REPOSITORY, "output_dir": REPOSITORY, "rewards": ("aesthetic",)}
    args = script.Args(**flags, sampling_steps=21, timestep_selection=selection, timestep_fraction=fraction)
    samples = [(place, g) for place in range(40) for g in range(10)]
    run = SimpleNamespace(args=args, generators=lambda purpose, keys: [keyed_generator(0, purpose, *key) for key in keys])
    drawn = script.draw_steps(samples, run).tolist()
    assert len(drawn) == 400 and all(len(set(row)) == len(row) == count for row in drawn)
    if steps is not None:
        assert drawn == [steps] * 400
    else:
        times = [sum(step in row for row in drawn) for step in range(20)]
        assert max(abs(n - 400 * count / 20) for n in times) < 4 * (400 * count / 20 * (1 - count / 20)) ** 0.5  # standard deviations
    pairs = torch.cat(script.split_into_updates(args, Ranks(0, 1, torch.device("cpu"))))
    assert len(set(map(tuple, pairs.tolist()))) == len(pairs) == args.prompts_per_iteration * args.num_generations * count


def test_loss_is_the_clipped_objective():
    log_ratio = torch.tensor([0.0, 0.05, -0.05, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    log_prob = (log_ratio - 3).requires_grad_()
    loss, stats = grpo_loss(log_prob, torch.full_like(log_ratio, -3), advantages, clip_range=0.1)
    terms = [min(r * a, max(min(r, 1.1), 0.9) * a) for r, a in zip(log_ratio.exp().tolist(), advantages.tolist())]
    assert loss.item() == pytest.approx(-sum(terms) / 7, abs=1e-12)
    loss.backward()
    # No gradient where the ratio has already moved too far the way the advantage points; the plain policy gradient elsewhere.
    free = torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    torch.testing.assert_close(log_prob.grad, torch.where(free, -advantages * log_ratio.exp() / 7, 0.0))
    assert stats["clip_frac"].item() == pytest.approx(4 / 7)
    assert stats["ratio_max_dev"].item() == pytest.approx(max(abs(r - 1) for r in log_ratio.exp().tolist()))


def test_old_log_probs_are_computed_again_in_the_updates_own_batches(monkeypatch):
    sizes, policy = [], torch.nn.Identity()

    def score_transitions(network, transitions, cond, schedule):
        assert network is policy and cond["prompt"].tolist() == [10 * int(z_t[0] // 2) for z_t in transitions["z_t"]]
        sizes.append(len(transitions["z_t"]))
        return transitions["z_t"].sum(1), None

    monkeypatch.setattr(train_grpo_flux, "score_transitions", score_transitions)
    args = SimpleNamespace(old_log_prob="rollout", micro_batch_size=3, kept_generations=2)
    run = SimpleNamespace(args=args, policy=policy, reference=None)
    z_t = torch.stack([torch.arange(4.0)[:, None].expand(4, 3), torch.rand(4, 3)], dim=-1)  # of 2 prompts with 2 samples with 3 steps
    trajectory, cond = {"z_t": z_t, "old_log_prob": torch.zeros(4, 3)}, {"prompt": torch.tensor([0, 10])}
    updates = [torch.cartesian_prod(torch.tensor(samples), torch.arange(3)) for samples in ([0, 2], [1, 3])]
    train_grpo_flux.score_before_updates(updates, trajectory, cond, None, run)
    assert sizes == [] and trajectory["old_log_prob"].eq(0).all()
    args.old_log_prob = "recompute"
    train_grpo_flux.score_before_updates(updates, trajectory, cond, None, run)
    assert sizes == [3, 3, 3, 3]
    assert torch.equal(trajectory["old_log_prob"], z_t.sum(-1))


def test_reference_kl_is_that_of_the_gaussians():
    z_t, u, u_ref = torch.randn(3, 2, 4, 5, dtype=torch.float64).unbind()
    schedule = torch.tensor([1.0, 0.9, 0.8, 0.4, 0.3]).double()
    t, s, levels = schedule[[1, 3]], schedule[[2, 4]], torch.tensor([0.3, 0.9]).double()
    means = [sde_step(z_t, v, t, s, levels)[0] for v in (u, u_ref)]
    std = (levels * (t - s).sqrt()).view(2, 1, 1)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Normal(mean, std) for mean in means)).mean()
    transitions = {"z_t": z_t, "step": torch.tensor([1, 3]), "noise_level": levels, "u_ref": u_ref}
    torch.testing.assert_close(reference_kl(transitions, schedule, u), expected)
    assert reference_kl(transitions, schedule, u_ref) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_transition_is_never_stochastic(name):
    """What it adds would not reach what is decoded."""
    script, folders = importlib.import_module(f"train_grpo_{name}"), {"embeddings": REPOSITORY, "output_dir": REPOSITORY}
    flags = {
        "model": tiny_model(name),
        **folders,
        "rewards": ("aesthetic",),
        "sampling_steps": 7,
        "height": 32,
        "width": 32,
    }
    assert list(script.Args(**flags).stochastic_steps) == [0, 1, 2, 3, 4, 5]
    assert list(script.Args(**flags, sde_window=(2, 4)).stochastic_steps) == [2, 3, 4, 5]
    for window in ((2, 5), (-1, 3), (6, 1), (1, 0)):
        with pytest.raises(UserError, match=f"--sde_window {window[0]} {window[1]} must lie within the first 6 of --sampling_steps 7"):
            script.Args(**flags, sde_window=window)


@pytest.mark.parametrize(("sp_size", "places"), [(1, [[2, 0], [3, 1]]), (2, [[1, 3, 0, 2]] * 2)])
def test_scores_come_to_the_places_of_their_prompts(monkeypatch, sp_size, places):
    """On two processes, by their own or sharing each sample. The score of sample g of the prompt at a place is 10 place + g."""
    summands = []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda values: summands.append(values) or values)
    for rank in range(2):
        run = Run.__new__(Run)
        run.ranks, run.device, run.rewards = Ranks(rank, 2, torch.device("cpu"), sp_size), torch.device("cpu"), {"a": None}
        run.args = SimpleNamespace(prompts_per_iteration=4, rollout_batch_size=2)
        samples = torch.tensor([10.0 * place + g for place in places[rank] for g in range(3)])
        run.of_all_prompts([{"a": samples[batch]} for batch in run.shared(len(samples))], places[rank], 3)
    assert sum(summands).view(4, 3).tolist() == [[10 * place + g for g in range(3)] for place in range(4)]


def test_every_epoch_visits_every_prompt_once_in_an_order_of_its_own():
    drawn = [i for iteration in range(1, 15) for i in shuffled_prompts(7, 3, iteration, seed=0)]  # 42 places: six epochs
    epochs = [drawn[k : k + 7] for k in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert shuffled_prompts(2, 5, 1, seed=0) != [] and len(shuffled_prompts(2, 5, 1, seed=0)) == 5  # more places than prompts


def test_random_draws_depend_on_their_key_alone():
    first = torch.randn(4, generator=keyed_generator(0, "step_noise", 3, 1, 2))
    assert torch.equal(first, torch.randn(4, generator=keyed_generator(0, "step_noise", 3, 1, 2)))
    others = [(1, "step_noise", 3, 1, 2), (0, "initial_noise", 3, 1, 2), (0, "step_noise", 31, 2), (0, "step_noise", 3, 2, 1)]
    assert all(not torch.equal(first, torch.randn(4, generator=keyed_generator(*key))) for key in others)


def test_a_ratio_that_is_not_1_warns_then_stops(capsys):
    check_ratio(1e-6, clip_range=1e-4)
    assert capsys.readouterr().err == ""
    check_ratio(2e-5, clip_range=1e-4)
    assert "warning: before the first update" in capsys.readouterr().err
    for deviation in (2e-4, float("nan")):
        with pytest.raises(UserError, match=r"--clip_range 0.0001.*--old_log_prob recompute"):
            check_ratio(deviation, clip_range=1e-4)
