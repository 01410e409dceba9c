"""fastvideo/evaluation/: intervals by another bootstrap and in simulated evaluations, win rates, groups, diversity."""

import math

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from fastvideo.evaluation import statistics
from fastvideo.evaluation.benchmarks import Benchmark
from fastvideo.evaluation.diversity import load_features, mean_distance
from fastvideo.evaluation.results import Scored, scored, summarise
from fastvideo.evaluation.statistics import margins, means, wins
from fastvideo.evaluation.store import Job, Record
from fastvideo.evaluation.tables import as_markdown
from fastvideo.rewards.clip import load_clip_folder

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------- intervals


def slow_margin(values: list[float], groups: list[str] | None, resamples: int, seed: int) -> float:
    """The same by its definition, in plain Python and with draws of its own."""
    parts: dict[str, list[float]] = {}
    for value, group in zip(values, groups or ["all"] * len(values), strict=True):
        parts.setdefault(group, []).append(value)

    def estimate(parts: list[list[float]]) -> tuple[float, float]:
        """Mean of means, and its standard error."""
        mean = sum(sum(part) / len(part) for part in parts) / len(parts)
        errors = [sum((x - sum(part) / len(part)) ** 2 for x in part) / (len(part) - 1) / len(part) for part in parts]
        return mean, math.sqrt(sum(errors)) / len(parts)

    mean, error = estimate(list(parts.values()))
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(resamples):
        again, own_error = estimate([[part[i] for i in generator.integers(len(part), size=len(part))] for part in parts.values()])
        ratios.append(abs(again - mean) / max(own_error, error / 3))
    return sorted(ratios)[math.ceil(0.95 * (resamples + 1)) - 1] * error


@pytest.mark.parametrize("groups", [None, [*"aabbbcccc"]], ids=["samples", "groups"])
@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_margins_are_those_of_another_bootstrap(kind, groups):
    generator = np.random.default_rng(5)
    values = {"normal": generator.normal(3, 2, size=9), "sparse": np.array([0, 0.2, 0, 0, 0, 1, 0, 0, 0.4])}[kind]
    slow = [slow_margin(values.tolist(), groups, 4999, seed) for seed in range(3)]
    found = [margins(np.stack([values, 2 - 5 * values]), groups, seed) for seed in range(3)]
    for pair in found:
        assert pair[1] == pytest.approx(5 * pair[0], rel=1e-9)
    assert np.mean(found, axis=0)[0] == pytest.approx(np.mean(slow), rel=0.04)


def test_margins_need_prompts_that_differ():
    assert margins(np.ones((1, 1)))[0] == math.inf
    assert margins(np.full((1, 8), 0.1))[0] == math.inf
    assert margins(np.array([[1.0, 2, 3, 4, 5]]), [*"aabbc"])[0] == math.inf
    assert 0 < margins(np.array([[1.0, 1, 1, 1, 2]]))[0] < 3
    found = margins(np.array([[0.1] * 5, [0.0] * 5, [1.0, 2, 3, 4, 5]]))
    assert [math.isfinite(margin) for margin in found] == [False, False, True]


def evaluations(kind: str, number: int, prompts: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """What `number` evaluations of 3 seeds x 4 pictures give for their prompts, (number, prompts), and the mean over all prompts there are.

    A prompt has a difficulty of its own, a seed an effect on the prompt, and a picture noise: pictures of one prompt are alike.
    """
    shape = (number, prompts)

    def pictures(difficulty: np.ndarray, spread: float) -> np.ndarray:
        seeds = difficulty[..., None, None] + 0.3 * spread * generator.normal(size=(*shape, 3, 1))
        return seeds + spread * generator.normal(size=(*shape, 3, 4))

    def correct(chance: np.ndarray) -> np.ndarray:
        return (generator.random((*shape, 3, 4)) < chance[..., None, None]).astype(float)

    if kind == "score":
        return pictures(generator.normal(0.5, 0.1, size=shape), 0.1).mean((2, 3)), 0.5
    if kind == "rate":
        return correct(generator.beta(0.5, 2, size=shape)).mean((2, 3)), 0.2
    if kind == "difference of scores":
        difficulty = generator.exponential(size=shape)
        gain = generator.normal(0.2, 0.3, size=shape)
        return (pictures(difficulty + gain, 0.5) - pictures(difficulty, 0.5)).mean((2, 3)), 0.2
    if kind == "difference of rates":
        chance = generator.beta(1, 3, size=shape)
        return (correct(chance + 0.3 * (1 - chance)) - correct(chance)).mean((2, 3)), 0.3 * 0.75
    assert kind == "win rate"  # of scores that are right or wrong, so that many are equal
    chance = generator.beta(1, 3, size=shape)
    return wins(correct(chance + 0.3 * (1 - chance)), correct(chance)).mean((2, 3)), 0.5 + 0.3 * 0.75 / 2


def coverage(kind: str, prompts: int, number: int, groups: list[str] | None, monkeypatch) -> float:
    """The share of simulated evaluations whose intervals hold the truth. Resamples are the same for all, and fewer than in use."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1999)
    values, truth = evaluations(kind, number, prompts, np.random.default_rng(prompts))
    held = 0
    for seed, part in enumerate(np.split(values, number // 50)):
        if groups:  # some kinds of questions are harder by far
            shifts = {group: 0.3 * place for place, group in enumerate(dict.fromkeys(groups))}
            part = part + np.array([shifts[group] for group in groups])
        expected = truth + (sum(shifts.values()) / len(shifts) if groups else 0)
        held += np.sum(np.abs(means(part, groups) - expected) <= margins(part, groups, seed))
    return held / number


KINDS = ("score", "rate", "difference of scores", "difference of rates", "win rate")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [16, 64])
def test_intervals_hold_the_truth_in_95_percent(kind, prompts, monkeypatch):
    found = coverage(kind, prompts, 4000, None, monkeypatch)
    print(f"{kind}, {prompts} prompts: {found:.1%}")
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("kind", ["score", "rate"])
def test_intervals_of_means_of_groups_hold_the_truth_in_95_percent(kind, monkeypatch):
    found = coverage(kind, 36, 4000, [*"aaaaaa", *"bbbbbbbbbbbb", *"cccccccccccccccccc"], monkeypatch)
    print(f"{kind}, 36 prompts in groups of 6, 12 and 18: {found:.1%}")
    assert 0.93 <= found <= 0.97


# ----------------------------------------------------------------------------------------------------------- from scores to results


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, dict[str, Scored]], Benchmark]:
    """Scores of three models on six prompts of two kinds, two seeds and two pictures; the third is the second with one score changed."""
    generator = np.random.default_rng(3)
    rows = [{"prompt": str(place), "tag": "ab"[place > 3]} for place in range(6)]
    parts = {}
    for model in ("base", "one"):
        scores = {"r": generator.integers(3, size=(6, 2, 2)).astype(float), "s": generator.normal(size=(6, 2, 2))}
        parts[model] = {"bench": Scored(scores, {"diversity.pixels": generator.random(6)})}
    parts["two"] = {"bench": Scored({name: values.copy() for name, values in scores.items()}, parts["one"]["bench"].diversity)}
    parts["two"]["bench"].scores["r"][5, 1, 0] += 0.5
    return parts, Benchmark("bench", rows, ("r", "s"), 2, group="tag", total="groups")


def test_the_whole_is_the_mean_of_groups_or_of_samples(found):
    parts, benchmark = found
    of_groups = summarise(parts, [benchmark])
    of_samples = summarise(parts, [Benchmark("bench", benchmark.rows, ("r", "s"), 2, group="tag")])
    for model, name in (("base", "r"), ("one", "s"), ("two", "r")):
        scores = parts[model]["bench"].scores[name]
        first, second = scores[:4].sum() / 16, scores[4:].sum() / 8
        whole, plain = (one["scores"][model]["bench"][name] for one in (of_groups, of_samples))
        assert [whole["groups"][group]["mean"] for group in "ab"] == pytest.approx([first, second])
        assert [whole["groups"][group]["prompts"] for group in "ab"] == [4, 2]
        assert whole["mean"] == pytest.approx((first + second) / 2)
        assert plain["mean"] == pytest.approx(scores.sum() / 24)
        assert plain["groups"] == whole["groups"]
        seeds = [(scores[:4, seed].sum() / 8 + scores[4:, seed].sum() / 4) / 2 for seed in range(2)]
        assert whole["seed_means"] == pytest.approx(seeds)
        assert whole["seed_std"] == pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)
        prompts = scores.mean((1, 2))
        assert whole["interval"] == pytest.approx([whole["mean"] + sign * margins(prompts[None], [*"aaaabb"])[0] for sign in (-1, 1)])
        assert plain["interval"] == pytest.approx([plain["mean"] + sign * margins(prompts[None])[0] for sign in (-1, 1)])


def test_differences_are_paired_and_ties_count_half(found):
    parts, benchmark = found
    differences = summarise(parts, [benchmark])["differences"]
    assert {model: [*against] for model, against in differences.items()} == {"one": ["base"], "two": ["base", "one"]}
    before, after = (parts[model]["bench"].scores["r"] for model in ("base", "one"))
    won = [(1 if b > a else 0.5 if b == a else 0) for a, b in zip(before.flatten(), after.flatten())]
    assert won.count(0.5) > 2
    entry = differences["one"]["base"]["bench"]["r"]
    assert entry["win_rate"]["mean"] == pytest.approx((sum(won[:16]) / 16 + sum(won[16:]) / 8) / 2)
    assert entry["mean"] == pytest.approx(((after - before)[:4].mean() + (after - before)[4:].mean()) / 2)
    paired = margins((after - before).mean((1, 2))[None], [*"aaaabb"])[0]
    assert entry["interval"] == pytest.approx([entry["mean"] - paired, entry["mean"] + paired])
    assert 0 <= entry["win_rate"]["interval"][0] <= entry["win_rate"]["interval"][1] <= 1
    assert differences["two"]["one"]["bench"]["r"]["groups"]["b"]["mean"] == pytest.approx(0.5 / 8)
    same = differences["two"]["one"]["bench"]["s"]
    assert (same["mean"], same["interval"], same["win_rate"]["mean"]) == (0, None, 0.5)
    assert "win_rate" not in differences["one"]["base"]["bench"]["diversity.pixels"]


@pytest.mark.parametrize(("gain", "low", "high"), [(1.0, 0.541, 1.0), (-1.0, 0.0, 1 - 0.541)])  # of Clopper and Pearson, for 6 of 6
def test_a_rate_without_exception_has_an_exact_interval(found, gain, low, high):
    parts, benchmark = found
    before = parts["base"]["bench"].scores
    models = {"base": parts["base"], "one": {"bench": Scored({name: values + gain for name, values in before.items()}, {})}}
    models["base"] = {"bench": Scored(before, {})}
    plain = summarise(models, [Benchmark("bench", benchmark.rows, ("r", "s"), 2, group="tag")])
    won = plain["differences"]["one"]["base"]["bench"]["s"]["win_rate"]
    assert won["interval"] == pytest.approx([low, high], abs=1e-3)
    assert won["groups"]["b"]["interval"] == pytest.approx([0.025**0.5, 1] if gain > 0 else [0, 1 - 0.025**0.5])
    assert summarise(models, [benchmark])["differences"]["one"]["base"]["bench"]["s"]["win_rate"]["interval"] is None  # of means of groups


def test_intervals_of_scores_of_0_and_1_are_those_of_rates(found):
    """They end at 0 and 1, also in groups, and their differences at -1 and 1; not so where a score is another, or all are the same."""
    _, benchmark = found
    base, one = np.zeros((6, 2, 2)), np.ones((6, 2, 2))
    base[0], one[0, 0, 0] = 1, 0  # of the kind "a", as 1, 2 and 3 are; 4 and 5 are "b"
    for bounded, low, high in ((True, 0, 1), (False, 0, 1.5), (False, 0, 0)):
        scores = {model: np.where(values == 1, high, low) for model, values in (("base", base), ("one", one))}
        models = {model: {"bench": Scored({"r": values.astype(float)}, {})} for model, values in scores.items()}
        results = summarise(models, [Benchmark("bench", benchmark.rows, ("r",), 2, group="tag")])
        before, after, difference = (
            *(results["scores"][name]["bench"]["r"] for name in models),
            results["differences"]["one"]["base"]["bench"]["r"],
        )
        if bounded:
            for entry, values in ((before, base), (after, one), (difference, one - base)):
                margin, mean = margins(values.mean((1, 2))[None])[0], values.mean()
                least = -1 if entry is difference else 0
                assert entry["interval"] == pytest.approx([max(least, mean - margin), min(1, mean + margin)])
                assert entry["groups"]["a"]["interval"][0] >= least and entry["groups"]["a"]["interval"][1] <= 1
            assert before["interval"][0] == before["groups"]["a"]["interval"][0] == 0 and after["interval"][1] == 1
            assert difference["groups"]["a"]["interval"][1] == 1
            assert before["groups"]["b"]["interval"] == pytest.approx([0, 1 - 0.025**0.5])
            facts = {"sampling": {}, "benchmarks": {"bench": {"prompts": 6, "samples": 24, "kind": "clip"}}}
            assert f"| r | base | {1 / 6:.4f} (0.0000 to {before['interval'][1]:.4f}) |" in as_markdown(facts | results)
        elif high:
            assert before["interval"][0] < 0 and after["interval"][1] > 1.5 and before["groups"]["b"]["interval"] is None
        else:
            assert before["interval"] is None


def test_markdown_has_a_table_for_each_model_unless_there_are_many(found):
    parts, benchmark = found
    for number, tables in ((2, 1), (3, 2), (5, 4), (6, 1)):
        models = {f"m{i}": parts["one"] for i in range(number)}
        facts = {"sampling": {"shift": 3}, "benchmarks": {"bench": {"prompts": 6, "samples": 24, "kind": "clip"}}}
        text = as_markdown(facts | summarise(models, [benchmark]))
        assert text.count("| reward | model | mean | difference to m") == tables
        assert ("Differences between checkpoints are in results.json" in text) == (number == 6)
        assert "## bench: 24 clips of 6 prompts by each model" in text


# ------------------------------------------------------------------------------------------------------------------------ diversity


def test_diversity_of_pixels_is_the_mean_distance_of_pairs():
    black, white, grey = (torch.full((3, 8, 8), value) for value in (-1.0, 1.0, 0.0))
    measure = load_features(None, CPU)["diversity.pixels"]
    assert mean_distance(list(measure(torch.stack([black, white])))) == pytest.approx(1)
    assert mean_distance(list(measure(torch.stack([white, white])))) == 0
    half = white.clone()
    half[:, :, :4] = -1
    assert mean_distance(list(measure(torch.stack([white, half, black])))) == pytest.approx((1 + 2 * 0.5**0.5) / 3)
    assert mean_distance(list(measure(torch.stack([grey, white])))) == pytest.approx(0.5, abs=0.005)
    large = torch.rand(2, 3, 96, 96) * 2 - 1  # only layout counts: noise is averaged away
    assert mean_distance(list(measure(large))) == pytest.approx(6**-0.5 / 3, rel=0.05)
    clips = torch.stack([torch.stack([black] * 3 + [white] * 9, 1), torch.stack([black] * 12, 1)])
    assert measure(clips).shape == (2, 8 * 3 * 8 * 8)
    assert mean_distance(list(measure(clips))) == pytest.approx(0.75**0.5)


def test_diversity_of_clip_is_one_minus_the_cosine():
    folder = REPOSITORY / "shapes" / "models" / "clip"
    model, _, prepare = load_clip_folder("clip", str(folder))
    media = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    media[1] = media[1].clamp(0.2, 1)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.get_image_features(pixel_values=prepare(media)).pooler_output, dim=-1)
    expected = np.mean([1 - float(vectors[i] @ vectors[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    measure = load_features(folder, CPU)["diversity.clip"]
    assert mean_distance(list(measure(media))) == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert expected > 1e-3
    still = media[:, :, None].expand(-1, -1, 4, -1, -1)
    assert mean_distance(list(measure(still))) == pytest.approx(mean_distance(list(measure(media))), rel=1e-2)


def test_diversity_takes_pictures_of_one_prompt_over_all_seeds():
    jobs = [Job(seed, prompt, k) for seed in range(2) for prompt in range(3) for k in range(2)]
    pixels = {job: np.full(4, [0, 255, 51][job.prompt] * (job.seed == 1 and job.k == 1), np.uint8) for job in jobs}
    records = {job: Record({"r": float(10 * job.prompt + job.seed + job.k / 10)}, {"diversity.pixels": pixels[job]}) for job in jobs}
    result = scored(records, jobs)
    assert result.diversity["diversity.pixels"] == pytest.approx([0, 0.5, 0.1])  # three of six pairs have the one that differs
    for job in jobs:
        assert result.scores["r"][job.prompt, job.seed, job.k] == records[job].scores["r"]
    single = [job for job in jobs if job.seed == job.k == 0]
    assert scored(records, single).diversity == {}
