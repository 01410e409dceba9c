"""What Algorithm 1 does with its pieces: a run of two iterations on two processes is recorded, and computed again from keys and formulas.

Nothing here calls the script's functions. Each step of the algorithm is checked against the recorded results of the step before, so that
a failure names the step. Letters: P prompts, G samples of each, T steps, N updates an iteration.
"""

import hashlib
import math
import statistics
from itertools import chain, product

import numpy as np
import pytest
import torch
from conftest import MODEL, metrics_of, weights_of
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from fastvideo.embeddings.cache import EmbeddingCache
from shapes.checker import aesthetic, check
from shapes.world import parse

P, G, KEPT, N, T, SEED, PROCESSES = 4, 6, 4, 2, 5, 7, 2
STOCHASTIC, TRAINED = [1, 2, 3], 2  # --sde_window 1 3, of which --timestep_fraction 0.6
SHIFT, NOISE, CLIP, KL, ADVANTAGE_CLIP, THRESHOLD = 3.0, 0.8, 1e-3, 5.0, 1.0, 0.605
LEARNING_RATE, WEIGHT_DECAY, WARMUP, MAX_NORM, EMA = 1e-3, 0.3, 3, 0.03, 0.9
WEIGHTS = {"shapes": 1.0, "aesthetic": -0.5}
FLAGS = {
    "--iterations": 2,
    "--seed": SEED,
    "--prompts_per_iteration": P,
    "--num_generations": G,
    "--best_of_n": KEPT,
    "--updates_per_iteration": N,
    "--sampling_steps": T,
    "--sde_window": (STOCHASTIC[0], len(STOCHASTIC)),
    "--timestep_fraction": 0.6,
    "--shift": SHIFT,
    "--noise_level": NOISE,
    "--noise_schedule": "decay",
    "--clip_range": CLIP,
    "--advantage_clip": ADVANTAGE_CLIP,
    "--kl_weight": KL,
    "--rewards": ("shapes", f"aesthetic@{THRESHOLD}"),
    "--reward_weights": tuple(WEIGHTS.values()),
    "--held_out_rewards": "shapes_strict",
    "--learning_rate": LEARNING_RATE,
    "--weight_decay": WEIGHT_DECAY,
    "--lr_warmup_steps": WARMUP,
    "--max_grad_norm": MAX_NORM,
    "--ema_decay": EMA,
    "--zero_stage": 0,  # each process has all weights and gradients
    "--rollout_batch_size": 5,  # of 12 samples
    "--micro_batch_size": 3,  # of 8 pairs
    "--sample_every": 2,
    "--checkpoint_every": 3,
}

RECORDER = """
import inspect, os, sys
import torch
import train_grpo_flux as script
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from fastvideo.parallel import distributed
from fastvideo.runs.run import Run
from fastvideo.runs.tracking import Tracker

events, rank = [], os.environ["RANK"]

def kept(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: kept(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [kept(item) for item in value]
    return value if isinstance(value, int | float | str | None) else type(value).__name__

def record(owner, name):
    function = getattr(owner, name)
    signature = inspect.signature(function)
    def recording(*arguments, **named):
        given = kept(signature.bind(*arguments, **named).arguments)
        result = function(*arguments, **named)
        events.append({"name": name, **given, "result": kept(result)})
        return result
    setattr(owner, name, recording)

for name in ("predict", "rollout", "decode", "score", "score_transitions", "grpo_loss"):
    record(script, name)
for name in ("backward", "report"):
    record(Run, name)
record(Tracker, "log_samples")

def weights(optimizer):
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]

def before_step(optimizer, arguments, named):
    gradients = [parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]]
    events.append({"name": "step", "gradients": gradients, "weights": weights(optimizer)})

def after_step(optimizer, arguments, named):
    events[-1]["after"] = weights(optimizer)

register_optimizer_step_pre_hook(before_step)
register_optimizer_step_post_hook(after_step)

def main():
    script.main()
    output_dir = sys.argv[sys.argv.index("--output_dir") + 1]
    torch.save(events, f"{output_dir}.{rank}.pt")

distributed.run(main)
"""


class Iteration:
    """What one iteration did. beginnings (before the window), rollouts, scores, steps: of each process, in order. updates: of each process,
    lists of micro-batches.
    """

    def __init__(self, number: int, events: list[list[dict]]):
        self.number = number
        self.beginnings, self.rollouts, self.scores, self.updates, self.steps = [], [], [], [], []
        for own in events:
            self.beginnings.append([rollout for rollout in rollouts_of(own) if len(rollout["levels"]) < T])
            self.rollouts.append([rollout for rollout in rollouts_of(own) if len(rollout["levels"]) == T])
            self.scores.append([(decoded, scored) for decoded, scored in zip(named(own, "decode"), named(own, "score"), strict=True)])
            self.steps.append(named(own, "step"))
            ends = [index + 2 for index, event in enumerate(own) if event["name"] == "step"]  # behind the `backward` that it is part of
            parts = [own[start:end] for start, end in zip([0, *ends], ends)]
            batches = [zip(self.last_scored(part), named(part, "grpo_loss"), named(part, "backward"), strict=True) for part in parts]
            self.updates.append([list(batch) for batch in batches])
        self.report = named(events[0], "report")[0]

    @staticmethod
    def last_scored(part: list[dict]) -> list[dict]:
        """Of each loss the transitions before it: earlier ones were scored for the KL divergence's reference."""
        scored, last = [], None
        for event in part:
            if event["name"] == "score_transitions":
                last = event
            if event["name"] == "grpo_loss":
                scored.append(last)
        return scored


def named(events: list[dict], name: str) -> list[dict]:
    return [event for event in events if event["name"] == name]


def rollouts_of(events: list[dict]) -> list[dict]:
    """The rollouts, each with the predictions that it made as "predictions"."""
    rollouts, predictions = [], []
    for event in events:
        if event["name"] == "predict":
            predictions.append(event)
        elif event["name"] == "rollout":
            rollouts.append(event | {"predictions": predictions})
        if event["name"] != "predict":
            predictions = []
    return rollouts


@pytest.fixture(scope="module")
def recorded(train, tmp_path_factory):
    """The two iterations, what came after them on each process, and the run folder."""
    folder = tmp_path_factory.mktemp("wiring")
    script, run = folder / "recorder.py", folder / "run"
    script.write_text(RECORDER)
    train(run, FLAGS, processes=PROCESSES, script=script)
    events = [torch.load(f"{run}.{rank}.pt") for rank in range(PROCESSES)]
    ends = [[index + 1 for index, event in enumerate(own) if event["name"] == "report"] for own in events]
    first_rollouts = [next(index for index, event in enumerate(own) if event["name"] == "predict") for own in events]
    one = [own[start : end[0]] for own, start, end in zip(events, first_rollouts, ends)]
    two = [own[end[0] : end[1]] for own, end in zip(events, ends)]
    return [Iteration(1, one), Iteration(2, two)], [own[end[1] :] for own, end in zip(events, ends)], run


@pytest.fixture(scope="module")
def prompts(recorded, cache):
    """The place of each prompt -> its index in the cache, for each iteration: all places of an epoch once, in the order of its key."""
    order = torch.randperm(10, generator=key("prompt_order", 0)).tolist()
    return {iteration: dict(enumerate(order[(iteration - 1) * P : iteration * P])) for iteration in (1, 2)}


def key(*words: object) -> torch.Generator:
    """The generator that docs promise: it depends on the seed and these words alone."""
    digest = hashlib.blake2b(repr((SEED, *words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def samples_of(rank: int) -> list[tuple[int, int]]:
    """(place of the prompt, number in its group) of a process's samples, in order."""
    return list(product(range(rank * P // PROCESSES, (rank + 1) * P // PROCESSES), range(G)))


def times() -> list[float]:
    return [SHIFT * t / (1 + (SHIFT - 1) * t) for t in (1 - step / T for step in range(T + 1))]


def transition(z: torch.Tensor, u: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
    """Mean (in double) and standard deviation of one sample's next latent."""
    t, s = times()[step : step + 2]
    z, u = z.double(), u.double()
    if step not in STOCHASTIC:
        return z + (s - t) * u, 0.0
    x = z - t * u
    score = -(z - (1 - t) * x) / t**2
    level = NOISE * math.sqrt(t)
    return z + (s - t) * (u - level**2 / 2 * score), level * math.sqrt(t - s)


def trained_steps(iteration: int, place: int, g: int) -> list[int]:
    return sorted(STOCHASTIC[i] for i in torch.randperm(len(STOCHASTIC), generator=key("timesteps", iteration, place, g))[:TRAINED])


def whole(iteration: Iteration, rank: int) -> dict[str, torch.Tensor]:
    """A process's trajectories and clean latents, all batches together."""
    parts = [rollout["result"][0] | {"x0_hat": rollout["result"][1]} for rollout in iteration.rollouts[rank]]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------------------------------------------------------- lines 2 to 5, 10


def test_each_sample_starts_from_its_keys_and_is_conditioned_on_its_prompt(recorded, prompts, cache):
    """The prompts are those of the epoch's order, each once, and those of the two processes are different ones. A prompt's samples, whose
    noise is the same, begin as one.
    """
    texts = EmbeddingCache(cache)
    for iteration in recorded[0]:
        drawn = prompts[iteration.number]
        for rank in range(PROCESSES):
            samples = samples_of(rank)
            assert [len(rollout["z_t"]) for rollout in iteration.rollouts[rank]] == [5, 5, 2]
            z_t = torch.cat([rollout["z_t"] for rollout in iteration.rollouts[rank]])
            (beginning,) = iteration.beginnings[rank]
            assert len(beginning["z_t"]) == P // PROCESSES
            embeds = torch.cat([rollout["cond"]["prompt_embeds"] for rollout in iteration.rollouts[rank]])
            pooled = torch.cat([rollout["cond"]["pooled_prompt_embeds"] for rollout in iteration.rollouts[rank]])
            for i, (place, _) in enumerate(samples):
                once = place % (P // PROCESSES)
                assert torch.equal(beginning["z_t"][once], torch.randn(16, 16, generator=key("initial_noise", iteration.number, place)))
                assert torch.equal(z_t[i], beginning["result"][1][once])
                row = texts.get([drawn[place]])
                assert torch.equal(embeds[i], row["prompt_embeds"][0]) and torch.equal(pooled[i], row["pooled_prompt_embeds"][0])
                assert torch.equal(beginning["cond"]["prompt_embeds"][once], embeds[i])
                assert torch.equal(beginning["cond"]["pooled_prompt_embeds"][once], pooled[i])
    assert not set(prompts[1].values()) & set(prompts[2].values())


def test_rollouts_follow_the_sde_with_each_samples_own_noise(recorded):
    """Euler steps outside the window, noise within it; kept is what the trained steps of each sample's key saw, did and gave."""
    for iteration, rank in product(recorded[0], range(PROCESSES)):
        samples, trajectory, done = samples_of(rank), whole(iteration, rank), 0
        for rollout in chain(iteration.beginnings[rank], iteration.rollouts[rank]):
            beginning, rows = len(rollout["levels"]) < T, len(rollout["z_t"])
            own = [] if beginning else samples[done : done + rows]
            noise = [key("step_noise", iteration.number, *sample) for sample in own]
            steps = range(STOCHASTIC[0]) if beginning else range(STOCHASTIC[0], T)
            latents = [rollout["z_t"], *(prediction["z_t"] for prediction in rollout["predictions"][1:]), rollout["result"][1]]
            for step, prediction, z_t, z_s in zip(steps, rollout["predictions"], latents[:-1], latents[1:], strict=True):
                assert torch.equal(prediction["z_t"], z_t)
                assert prediction["t"].tolist() == pytest.approx([times()[step]] * rows, abs=1e-6)
                assert torch.equal(prediction["cond"]["prompt_embeds"], rollout["cond"]["prompt_embeds"])
                for i in range(rows):
                    mean, std = transition(z_t[i], prediction["result"][i], step)
                    drawn = torch.randn(16, 16, generator=noise[i]) if std else torch.zeros(16, 16)
                    torch.testing.assert_close(z_s[i].double(), mean + std * drawn.double(), atol=1e-4, rtol=1e-4)
                    chosen = [] if beginning else trained_steps(iteration.number, *own[i])
                    assert beginning or trajectory["step"][done + i].tolist() == chosen
                    if step in chosen:
                        k = chosen.index(step)
                        assert torch.equal(trajectory["z_t"][done + i, k], z_t[i])
                        assert torch.equal(trajectory["z_s"][done + i, k], z_s[i])
                        gaussian = torch.distributions.Normal(mean, std)
                        expected = gaussian.log_prob(z_s[i].double()).mean().item()
                        assert trajectory["old_log_prob"][done + i, k].item() == pytest.approx(expected, abs=1e-4)
            done += len(own)
        assert len({tuple(steps) for steps in trajectory["step"].tolist()}) > 1
        assert not torch.isin(trajectory["step"], torch.tensor([0, T - 1])).any()


# -------------------------------------------------------------------------------------------------------------------- lines 6 to 9


@torch.no_grad()
def test_each_sample_is_scored_with_its_own_prompt(recorded, prompts, cache):
    texts, vae = EmbeddingCache(cache), AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
    for iteration, rank in product(recorded[0], range(PROCESSES)):
        clean = torch.cat([decoded["x0_hat"] for decoded, _ in iteration.scores[rank]])
        assert torch.equal(clean, whole(iteration, rank)["x0_hat"])
        media = torch.cat([scored["media"] for _, scored in iteration.scores[rank]])
        latents = FluxPipeline._unpack_latents(clean, 32, 32, 2 ** (len(vae.config.block_out_channels) - 1))
        pictures = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(media, pictures, atol=1e-4, rtol=0)
        rows = [row["prompt"] for _, scored in iteration.scores[rank] for row in scored["rows"]]
        assert rows == [texts.rows[prompts[iteration.number][place]]["prompt"] for place, _ in samples_of(rank)]


def rewards_of(iteration: Iteration) -> dict[str, list[list[float]]]:
    """Of all prompts, as the pictures and prompts that were scored have it by the shapes world's own rules: name -> P x G."""
    rewards = {"shapes": [], "aesthetic": []}
    for rank in range(PROCESSES):
        pictures = np.concatenate([scored["media"].numpy() / 2 + 0.5 for _, scored in iteration.scores[rank]])
        captions = [row["prompt"] for _, scored in iteration.scores[rank] for row in scored["rows"]]
        rewards["shapes"] += check(pictures, [parse(caption) for caption in captions])["soft"].tolist()
        rewards["aesthetic"] += [float(value > THRESHOLD) for value in aesthetic(pictures).tolist()]
    return {name: [values[start : start + G] for start in range(0, P * G, G)] for name, values in rewards.items()}


def test_advantages_are_weighted_sums_of_each_rewards_within_each_prompts_group(recorded):
    mixed = 0  # groups in which the binary reward tells samples apart
    for iteration in recorded[0]:
        rewards = rewards_of(iteration)
        for name, values in rewards.items():
            torch.testing.assert_close(iteration.report["rewards"][name], torch.tensor(values), atol=1e-5, rtol=0)
        for place, g in product(range(P), range(G)):
            total = 0.0
            for name, weight in WEIGHTS.items():
                group = rewards[name][place]
                if min(group) != max(group):
                    total += weight * (group[g] - statistics.mean(group)) / statistics.stdev(group)
            expected = max(-ADVANTAGE_CLIP, min(ADVANTAGE_CLIP, total))
            assert iteration.report["advantages"][place, g].item() == pytest.approx(expected, abs=1e-4)
        mixed += sum(min(group) != max(group) for group in rewards["aesthetic"])
        assert (iteration.report["advantages"].abs() == ADVANTAGE_CLIP).any()
    assert mixed >= 2


# ------------------------------------------------------------------------------------------------------------------ lines 10 to 13


def best(advantages: torch.Tensor) -> list[int]:
    """The KEPT / 2 with the highest and with the lowest advantages of a group, in the order of the samples."""
    order = sorted(range(G), key=lambda g: -advantages[g].item())
    return sorted(order[: KEPT // 2] + order[-KEPT // 2 :])


def assigned(iteration: Iteration, rank: int, update: int) -> list[tuple[int, int, int]]:
    """(place, g, k) that an update has to train on: every N-th of each prompt's kept samples, with all of its steps."""
    places = range(rank * P // PROCESSES, (rank + 1) * P // PROCESSES)
    kept = {place: best(iteration.report["advantages"][place]) for place in places}
    return [(place, g, k) for place in places for g in kept[place][update::N] for k in range(TRAINED)]


def trained(iteration: Iteration, rank: int, update: int) -> list[list[tuple[int, int, int]]]:
    """(place, g, k) of each micro-batch, found by the latents that no two transitions have in common."""
    trajectory, samples = whole(iteration, rank), samples_of(rank)
    known = {trajectory["z_s"][i, k].numpy().tobytes(): (*samples[i], k) for i, k in product(range(len(samples)), range(TRAINED))}
    batches = iteration.updates[rank][update]
    return [[known[z_s.numpy().tobytes()] for z_s in scored["transitions"]["z_s"]] for scored, _, _ in batches]


def test_every_kept_transition_is_trained_once_with_its_own_numbers(recorded, prompts, cache):
    """In the right update, with its step, its latents, its prompt, its log-prob of the rollout and its sample's advantage."""
    texts = EmbeddingCache(cache)
    for iteration, rank in product(recorded[0], range(PROCESSES)):
        samples, trajectory, done = samples_of(rank), whole(iteration, rank), []
        for update in range(N):
            batches = trained(iteration, rank, update)
            assert [len(batch) for batch in batches] == [3, 3, 2]
            assert sorted(chain(*batches)) == sorted(assigned(iteration, rank, update))
            done += chain(*batches)
            for batch, (scored, loss, backward) in zip(batches, iteration.updates[rank][update], strict=True):
                assert backward["share"] == len(batch) / 8
                assert loss["clip_range"] == CLIP
                for row, (place, g, k) in enumerate(batch):
                    i = samples.index((place, g))
                    for name in ("step", "noise_level", "z_t", "z_s", "old_log_prob"):
                        assert torch.equal(scored["transitions"][name][row], trajectory[name][i, k])
                    embeds = texts.get([prompts[iteration.number][place]])["prompt_embeds"][0]
                    assert torch.equal(scored["cond"]["prompt_embeds"][row], embeds)
                    assert loss["old_log_prob"][row] == trajectory["old_log_prob"][i, k]
                    assert loss["advantages"][row] == iteration.report["advantages"][place, g]
                    assert loss["log_prob"][row] == scored["result"][0][row]
        assert len(set(done)) == len(done) == P // PROCESSES * KEPT * TRAINED


def network(weights: list[torch.Tensor] | None = None) -> FluxTransformer2DModel:
    """With these weights, in the order of its parameters, or with the initial ones."""
    model = FluxTransformer2DModel.from_pretrained(MODEL, subfolder="transformer")
    for parameter, weight in zip(model.parameters(), weights or [], strict=weights is not None):
        parameter.data.copy_(weight)
    return model


def predicted(model: FluxTransformer2DModel, z_t: torch.Tensor, t: float, cond: dict) -> torch.Tensor:
    """One sample's u_hat."""
    texts = {"encoder_hidden_states": cond["prompt_embeds"][None], "pooled_projections": cond["pooled_prompt_embeds"][None]}
    ids = {"img_ids": cond["img_ids"], "txt_ids": cond["txt_ids"]}
    return model(z_t[None], timestep=torch.tensor([t]), **texts, **ids, return_dict=False)[0][0]


@pytest.fixture(scope="module")
def objective(recorded):
    """Of each update of each iteration: its loss, the mean over all processes' pairs, and its gradients; each pair's ratio and KL."""
    initial, found = network(), []
    for iteration, update in product(recorded[0], range(N)):
        model, total, ratios, kls = network(iteration.steps[0][update]["weights"]), 0.0, [], []
        for rank in range(PROCESSES):
            for scored, loss, _ in iteration.updates[rank][update]:
                for row, advantage in enumerate(loss["advantages"].tolist()):
                    cond = {name: tensor[row] for name, tensor in scored["cond"].items()}
                    z_t, z_s = (scored["transitions"][name][row] for name in ("z_t", "z_s"))
                    step = scored["transitions"]["step"][row].item()
                    mean, std = transition(z_t, predicted(model, z_t, times()[step], cond), step)
                    with torch.no_grad():
                        mean_ref, _ = transition(z_t, predicted(initial, z_t, times()[step], cond), step)
                    log_prob = torch.distributions.Normal(mean, std).log_prob(z_s.double()).mean()
                    ratio = (log_prob - loss["old_log_prob"][row]).exp()
                    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).mean()
                    total = total - torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage) + KL * kl
                    ratios.append(ratio.item())
                    kls.append(kl.item())
        mean_loss = total / (P * KEPT * TRAINED / N)
        mean_loss.backward()
        found.append((mean_loss.item(), [parameter.grad for parameter in model.parameters()], ratios, kls))
    return found


def test_gradients_are_those_of_the_mean_objective_of_all_processes(recorded, objective):
    """With the sign of ascent, the KL divergence added, micro-batches of unequal size weighted by it, and clipped to the norm."""
    steps = [iteration.steps[0][update] for iteration in recorded[0] for update in range(N)]
    reported = [row["policy/grad_norm"] for row in metrics_of(recorded[2])]
    norms = []
    for step, (_, gradients, _, _) in zip(steps, objective, strict=True):
        norms.append(math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients)))
        scale = min(1.0, MAX_NORM / norms[-1])
        difference = sum((ours - scale * expected).square().sum() for ours, expected in zip(step["gradients"], gradients, strict=True))
        assert difference.sqrt().item() < 1e-3 * scale * norms[-1]
    assert reported == pytest.approx([(norms[0] + norms[1]) / 2, (norms[2] + norms[3]) / 2], rel=1e-3)
    assert all(norm > 2 * MAX_NORM for norm in norms), norms


def test_processes_stay_equal(recorded):
    for iteration, update in product(recorded[0], range(N)):
        one, other = (iteration.steps[rank][update]["after"] for rank in range(PROCESSES))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_ratio_is_1_then_clipping_acts_and_the_kl_grows(recorded, objective):
    (_, _, first, none), (_, _, second, some) = objective[:2]
    assert all(abs(ratio - 1) < 1e-5 for ratio in first) and max(none) < 1e-9
    outside = [abs(ratio - 1) > CLIP for ratio in second]
    assert any(outside) and not all(outside)
    assert min(some) > 1e-7


def test_metrics_are_means_over_all_pairs_of_all_processes(recorded, objective):
    for row, two in zip(metrics_of(recorded[2]), (objective[:2], objective[2:]), strict=True):
        ratios, kls = [ratio for update in two for ratio in update[2]], [kl for update in two for kl in update[3]]
        assert row["policy/ratio_mean"] == pytest.approx(statistics.mean(ratios), abs=1e-5)
        assert row["policy/kl"] == pytest.approx(statistics.mean(kls), rel=1e-3)
        assert row["policy/clip_frac"] == pytest.approx(statistics.mean(abs(ratio - 1) > CLIP for ratio in ratios), abs=1 / 32)
        assert row["policy/loss"] + KL * row["policy/kl"] == pytest.approx((two[0][0] + two[1][0]) / 2, rel=1e-3, abs=1e-5)
        assert row["policy/approx_kl"] == pytest.approx(statistics.mean(r - 1 - math.log(r) for r in ratios), rel=1e-2, abs=1e-9)
        assert row["policy/ratio_max_dev"] < 1e-5
    for iteration, row in zip(recorded[0], metrics_of(recorded[2])):
        for name, values in rewards_of(iteration).items():
            assert row[f"reward/{name}_mean"] == pytest.approx(statistics.mean(chain(*values)), abs=1e-5)
        assert row["advantage/abs_mean"] == pytest.approx(iteration.report["advantages"].abs().mean().item(), rel=1e-5)
        assert row["samples"] == iteration.number * P * G
        assert "held_out/shapes_strict_mean" in row


def test_the_optimizer_is_adamw_with_warm_up(recorded):
    """By hand from the recorded gradients, weight decay and all; all but 1 in 10,000 steps are within a hundredth of the rate."""
    steps = [iteration.steps[0][update] for iteration in recorded[0] for update in range(N)]
    initial = list(network().parameters())
    assert all(torch.equal(a, b) for a, b in zip(initial, steps[0]["weights"], strict=True))
    for index in range(len(initial)):
        weight = initial[index].detach().double()
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        for number, step in enumerate(steps, 1):
            assert torch.equal(step["weights"][index], steps[number - 2]["after"][index] if number > 1 else initial[index])
            rate, gradient = LEARNING_RATE * min(1, number / WARMUP), step["gradients"][index].double()
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moved = m / (1 - 0.9**number) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
            weight = weight - rate * WEIGHT_DECAY * weight - rate * moved
            torch.testing.assert_close(step["after"][index].double(), weight, atol=1e-2 * rate, rtol=1e-5)
    assert [row["policy/lr"] for row in metrics_of(recorded[2])] == pytest.approx([LEARNING_RATE, LEARNING_RATE])  # of the coming update


@torch.no_grad()
def test_what_is_exported_and_drawn_is_the_moving_average(recorded, cache):
    """Of the weights after each update. The grid has the cache's first prompts, by Euler steps from noise of its own."""
    iterations, rest, run = recorded
    average = [parameter.detach().double() for parameter in network().parameters()]
    for iteration, update in product(iterations, range(N)):
        average = [EMA * a + (1 - EMA) * w.double() for a, w in zip(average, iteration.steps[0][update]["after"], strict=True)]
    exported = weights_of(run / "export" / "transformer")
    for (name, _), expected in zip(network().named_parameters(), average, strict=True):
        torch.testing.assert_close(exported[name].double(), expected, atol=1e-7, rtol=1e-5)

    model, texts, pictures = network(average), EmbeddingCache(cache), []
    for rank in range(PROCESSES):
        (rollout,) = rollouts_of(rest[rank])
        assert rollout["levels"] == [0.0] * T
        for i, place in enumerate(range(rank * 4, rank * 4 + 4)):
            z = torch.randn(16, 16, generator=key("pictures", place))
            assert torch.equal(rollout["z_t"][i], z)
            cond = {name: tensor[i] for name, tensor in rollout["cond"].items()}
            assert torch.equal(cond["prompt_embeds"], texts.get([place])["prompt_embeds"][0])
            for t, s in zip(times(), times()[1:]):
                z = z + (s - t) * predicted(model, z, t, cond)
            torch.testing.assert_close(rollout["result"][1][i], z, atol=1e-3, rtol=1e-3)
        decoded = named(rest[rank], "decode")
        assert torch.equal(torch.cat([event["x0_hat"] for event in decoded]), rollout["result"][1])
        pictures += [event["result"] for event in decoded]
    assert (run / "checkpoints" / "latest").read_text() == "iteration_000002"
    (shown,) = named(rest[0], "log_samples")
    assert shown["iteration"] == 2
    assert torch.equal(shown["media"], torch.cat(pictures))
    assert shown["captions"] == [row["prompt"] for row in texts.rows[:8]]
