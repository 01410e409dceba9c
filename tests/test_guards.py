"""What metrics.jsonl shows of a run that goes wrong: warnings, --stop_on_collapse, and which checkpoint is kept as the best."""

import json
import random
import re
from pathlib import Path

import pytest
from conftest import largest_difference, metrics_of, weights_of

from fastvideo.runs import guards
from fastvideo.runs.guards import EVALUATIONS, HISTORY, SPIKES, WINDOW

CLIP_RANGE = 1e-4


def curve(*values: float, noise: float = 0.03, std: float = 0.25, seed: int = 0, **others: float) -> list[dict[str, float]]:
    """Rows of a run whose reward has these means, as the shapes runs have: the mix of prompts moves them by `noise`."""
    draw = random.Random(seed)
    row = {"reward/a_std": std, "reward/zero_std_frac": 0.1, "policy/approx_kl": 1e-7, "policy/kl": 1e-3} | others
    return [
        row | {"iteration": i, "reward/a_mean": draw.gauss(value, noise), "policy/grad_norm": draw.lognormvariate(-3, 0.2)}
        for i, value in enumerate(values, start=1)
    ]


def line(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / (count - 1) for i in range(count)]


class Run:
    """A run folder whose metrics grow row by row, looked at after each."""

    def __init__(self, folder: Path, capsys, keep: int = 3):
        self.folder, self.capsys = folder, capsys
        self.start({"learning_rate": 1, "keep_checkpoints": keep}, 0)

    def start(self, arguments: dict, iteration: int, **same: object) -> None:
        """Write the manifest as a start from `iteration` does."""
        path = self.folder / "manifest.json"
        arguments = {"rewards": ["trained"], "reward_weights": [1]} | arguments
        manifest, history = {"arguments": arguments, "from_iteration": iteration, "started": iteration}, []
        if path.exists():
            before = json.loads(path.read_text())
            history = [*before.pop("history"), {name: value for name, value in before.items() if manifest[name] != value}]
        path.write_text(json.dumps(manifest | {"history": history}))
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines[:iteration]))

    def go(self, rows: list[dict]) -> tuple[list[str], dict[int, str]]:
        """The warnings, and what the run would have stopped with after each iteration."""
        errors = {}
        for row in rows:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if error := guards._check(self.folder, row["iteration"], CLIP_RANGE):
                errors[row["iteration"]] = str(error)
        return self.capsys.readouterr().err.splitlines(), errors

    def save(self, *iterations: int) -> list[Path]:
        paths = [self.folder / "checkpoints" / f"iteration_{iteration:06d}" for iteration in iterations]
        for path in paths:
            path.mkdir(parents=True)
        return paths


@pytest.fixture
def run(tmp_path, capsys) -> Run:
    return Run(tmp_path, capsys)


# ------------------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "values",
    [line(0.6, 0.8, 200), [0.6] * 200, line(0.6, 0.8, 100) + line(0.8, 0.7, 100), line(0.5, 0.95, 50) + [1.0] * 50],
    ids=["rises", "stays", "falls_a_little", "to_the_top"],
)
def test_healthy_runs_are_left_alone(run, values, seed):
    assert run.go(curve(*values, seed=seed)) == ([], {})


def test_reward_collapse(run):
    run.save(20, 40)
    warnings, errors = run.go(curve(*line(0.5, 0.7, 40), *line(0.7, 0.2, 10), *[0.2] * 20))
    (warning,) = warnings  # not again at the end of each window
    assert warning.startswith("warning: reward collapse: reward/a_mean fell from 0.6")
    assert " by iteration 40 to 0." in warning
    assert list(errors) == [60, 70]
    assert "write iteration_000040 into" in errors[60]
    assert "give the same command with --allow_changed_args and a lower --learning_rate" in errors[60]


def test_collapse_within_the_first_window(run):
    """As the quickstart's run with 100 times its learning rate: nothing is left after four iterations."""
    warnings, errors = run.go(curve(*line(0.6, 0.1, 5), *[0.1] * 25))
    assert list(errors) == [20, 30]
    assert warnings[0].startswith("warning: reward collapse: reward/a_mean fell from 0.6") and " by iteration 1 to 0.0" in warnings[0]


def test_a_perfect_reward_may_fall_by_what_its_failures_explain(run):
    """Binary, always 1 for a while, so that its spread is 0; then some samples fail, then every other iteration's prompts are too hard."""

    def window(number: int, std: float, mean) -> list[dict]:
        rows = curve(*[1.0] * WINDOW, noise=0, std=std)
        return [row | {"iteration": number * WINDOW + 1 + i, "reward/a_mean": mean(i)} for i, row in enumerate(rows)]

    healthy = [*window(0, 0.0, lambda i: 1.0), *window(1, 0.3, lambda i: 0.9), *window(2, 0.0, lambda i: i % 2)]
    assert run.go(healthy) == ([], {})
    assert list(run.go(window(3, 0.0, lambda i: 0.0))[1]) == [40]


def test_no_signal(run):
    silent = {"reward/zero_std_frac": 0.96}
    rows = curve(*[0.5] * 40)
    rows = [row | silent if 11 <= row["iteration"] <= 19 or row["iteration"] > 22 else row for row in rows]
    warnings, errors = run.go(rows)
    assert list(errors) == [40]
    assert "no signal: in each of the last 10 iterations reward/zero_std_frac was 0.95 or more" in warnings[0] + errors[40]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("name", "healthy", "exploded"),
    [("approx_kl", 4.9e-5, 5.1e-5), ("kl", 0.099, 0.101), ("grad_norm", 0.1, float("nan")), ("grad_norm", 0.1, float("inf"))],
)
def test_policy_explosion(run, name, healthy, exploded):
    rows = curve(*[0.5] * 25)
    rows[13][f"policy/{name}"] = healthy
    for i in (16, 17, 22):
        rows[i][f"policy/{name}"] = exploded
    warnings, errors = run.go(rows)
    assert list(errors) == [17, 18, 23]
    said = [warning.split(" is ")[0] for warning in warnings if "policy explosion" in warning]
    assert said == [f"warning: policy explosion: policy/{name}"] * 2  # at 17 and 23
    assert "start again in another --output_dir, with a lower --learning_rate" in errors[17]


def test_the_divergence_from_the_initial_policy_may_grow(run):
    """As the square of the iterations, far beyond what would be an explosion if it came at once."""
    assert run.go([row | {"policy/kl": 1e-4 * row["iteration"] ** 2} for row in curve(*[0.5] * 100)]) == ([], {})


def test_a_wide_clip_range_has_a_bound_too():
    (row,) = curve(0.5, **{"policy/approx_kl": 0.51})
    assert guards.policy_explosion([row], clip_range=0.2)
    assert not guards.policy_explosion([row | {"policy/approx_kl": 0.49}], clip_range=0.2)


def test_gradient_spikes(run):
    rows = curve(*[0.5] * 60)
    for i in (3, 25, 50, 54, 57):  # the first before a usual value is known
        rows[i]["policy/grad_norm"] *= 30
    run.save(30, 50)
    warnings, errors = run.go(rows)
    assert [warning.split()[-1] for warning in warnings[:4]] == ["26", "51", "55", "58"]
    assert warnings[4:] == [
        "warning: gradients out of bounds: policy/grad_norm was above 10 times its usual value in iterations 51, 55, 58"
    ]
    assert list(errors) == [58]
    assert "write iteration_000050 into" in errors[58] and "a lower --max_grad_norm" in errors[58]
    assert (HISTORY, SPIKES) == (20, 3)


def test_iterations_without_a_gradient_are_no_measure(run):
    """A reward that is rarely earned: most iterations have no gradient, and those that have one are no spikes."""
    rows = curve(*[0.01] * 100)
    for row in rows:
        row["policy/grad_norm"] *= row["iteration"] % 4 == 0
    assert run.go(rows) == ([], {})


def over_optimized(trained, held_out) -> list[dict[str, float]]:
    """A run in which each window's mean is as given."""
    return [
        row | {"reward/a_mean": a + 0.3 * (-1) ** j, "held_out/b_mean": b - 0.1 * (-1) ** j, "iteration": WINDOW * i + j + 1}
        for i, (a, b) in enumerate(zip(trained, held_out))
        for j, row in enumerate(curve(*[0.5] * WINDOW))
    ]


def test_over_optimisation_is_said(run):
    warnings, errors = run.go(over_optimized([0.1, 0.2, 0.3, 0.25, 0.4, 0.5], [0.5, 0.9, 0.8, 0.7, 0.6, 0.5]))
    (warning,) = warnings
    assert warning.startswith("warning: over-optimisation: since iteration 11 held_out/b_mean fell from 0.9 to 0.6")
    assert "while reward/a_mean rose from 0.2 to 0.4" in warning
    assert errors == {}


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [([0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.85, 0.7]), ([0.4, 0.3, 0.2, 0.1], [0.9, 0.8, 0.7, 0.6]), ([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])],
    ids=["it_rose_once", "all_fall", "too_early"],
)
def test_no_false_alarm(run, trained, held_out):
    assert EVALUATIONS == 4
    assert run.go(over_optimized(trained, held_out)) == ([], {})


# ------------------------------------------------------------------------------------------------------- after the user went back


def test_changed_arguments_are_a_new_chance(run):
    """What was wrong before is not held against a run that goes on differently; against the same one it is."""
    collapsed = curve(*[0.8] * 20, *[0.2] * 20)
    run.go(collapsed)
    run.start({"learning_rate": 1, "keep_checkpoints": 3}, 35)
    assert list(run.go(collapsed[35:])[1]) == [40]
    run.start({"learning_rate": 0.1, "keep_checkpoints": 3}, 25)
    rows = [row | {"iteration": 26 + i} for i, row in enumerate(curve(*[0.2] * 35))]
    assert run.go(rows[:30]) == ([], {})
    run.start({"learning_rate": 0.1, "keep_checkpoints": 3}, 30)  # later than the change, but not a change
    assert run.go([row | {"policy/approx_kl": 1.0} for row in rows[5:6]])[1].keys() == {31}
    run.start({"learning_rate": 0.01, "keep_checkpoints": 3}, 30)
    run.start({"learning_rate": 0.01, "keep_checkpoints": 3}, 28)  # before the change, and not a change
    assert run.go([row | {"policy/approx_kl": 1.0} for row in rows[3:4]])[1].keys() == {29}


def test_the_way_back_is_the_newest_from_before(run):
    run.start({"learning_rate": 1, "keep_checkpoints": 7}, 0)
    run.save(5, 10, 15, 20, 25)
    assert "write iteration_000020 into" in run.go(curve(*[0.7] * 10, *[0.8] * 10, *[0.2] * 10))[1][30]  # the reward fell after 20


def test_checkpoints_of_bad_times_are_no_way_back(run):
    """The first explosion was saved too, and the same command went on from there."""
    run.save(1, 2)
    rows = curve(0.5, 0.5, 0.0, 0.0)
    _, errors = run.go([row | {"policy/approx_kl": 1.0} if row["iteration"] > 1 else row for row in rows])
    assert list(errors) == [2, 3, 4]
    assert all("write iteration_000001 into" in error for error in errors.values())


@pytest.mark.parametrize("reward", ["a=FILE@0.5", "my rewards/b=1.py:a,power=2@0.5"])
def test_a_penalty_should_fall(run, reward):
    """A reward whose weight is negative; with a positive one it is a collapse."""
    fall = curve(*line(0.7, 0.2, 30), *[0.2] * 10)
    run.start({"reward_weights": [-1], "rewards": [reward], "keep_checkpoints": 3}, 0)
    assert run.go(fall) == ([], {})
    run.start({"reward_weights": [1], "rewards": [reward], "keep_checkpoints": 3}, 0)
    assert run.go(fall)[1]


def test_the_way_back_is_one_that_is_still_there(run):
    """The save that follows leaves --keep_checkpoints 2, itself and one more, and the best."""
    run.save(10, 20, 30)
    rows = curve(*[0.7] * 10, *[0.8] * 10, *[0.2] * 20)

    def said(**held_out: list[float]) -> str:
        run.start({"learning_rate": len(held_out), "keep_checkpoints": 2}, 0)
        extra = [{f"held_out/{name}_mean": v, f"held_out/{name}_std": 0.1} for name, values in held_out.items() for v in values] or [
            {}
        ] * 40
        return run.go([row | held for row, held in zip(rows, extra)])[1][40]

    assert "No checkpoint from before is kept" in said()  # the reward fell after 20, and 30 is what will be kept
    assert "write iteration_000010 into" in said(b=[0.5] * 10 + [0.4] * 30)
    assert "No checkpoint from before is kept" in said(b=line(0.5, 0.9, 40))  # the one that is about to be saved is the best


# ------------------------------------------------------------------------------------------------------------ the best checkpoint


def test_best_checkpoint(run):
    paths = run.save(5, 20, 30, 40)
    assert guards.best_checkpoint(run.folder, paths) is None  # nothing is known of any
    rows = curve(*[0.5] * 40)
    run.go(rows)
    assert guards.best_checkpoint(run.folder, paths) is None  # no reward is held out
    means = {5: (0.5, 5.0), 20: (0.7, 6.0), 30: (0.6, 9.0), 40: (0.4, 9.5)}  # the run's first ten iterations have 0.5 and 5

    def held_out(iteration: int, names: str) -> dict[str, float]:
        window = means[5 if iteration <= 10 else next(end for end in means if iteration <= end)]
        rise = 0.05 * ((iteration - 1) % 10 - 4.5) * (20 < iteration <= 30)  # within a window it does not matter
        both = {
            "b": {"held_out/b_mean": window[0] + rise, "held_out/b_std": 0.1},
            "c": {"held_out/c_mean": window[1], "held_out/c_std": 10.0},
        }
        return {key: value for name in names for key, value in both[name].items()}

    def best(names) -> str:
        run.start({"keep_checkpoints": 3}, 0)
        run.go([row | held_out(row["iteration"], names(row["iteration"])) for row in rows])
        return guards.best_checkpoint(run.folder, paths).name

    assert best(lambda iteration: "b") == "iteration_000020"
    assert best(lambda iteration: "c") == "iteration_000040"
    assert best(lambda iteration: "bc") == "iteration_000020"  # gains of (2 + 0.1) / 2, (1 + 0.4) / 2, (-1 + 0.45) / 2
    assert best(lambda iteration: "b" if iteration <= 30 else "") == "iteration_000020"  # dropped on a resume
    assert best(lambda iteration: "b" if iteration > 20 else "") == "iteration_000030"  # asked for on a resume
    means = dict.fromkeys(means, (0.0, 7.0))
    assert best(lambda iteration: "c") == "iteration_000040"  # of equals


# -------------------------------------------------------------------------------------------------------------------- real runs


def names_in(checkpoints: Path) -> set[str]:
    return {path.name for path in checkpoints.iterdir()}


def test_stop_on_collapse_reaches_all_processes(train, tmp_path):
    """A learning rate 100 times too high moves the policy out of all bounds in the first iteration, which is saved."""
    run = tmp_path / "run"
    result = train(run, {"--learning_rate": 1e-2}, "--stop_on_collapse", processes=2, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    sentences = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert len(sentences) == 1, result.stderr
    assert "error: policy explosion: policy/approx_kl is " in result.stderr
    assert len(metrics_of(run)) == 1
    assert names_in(run / "checkpoints") == {"iteration_000001", "latest"}
    assert result.stderr.count("warning: policy explosion") == 1


def test_best_checkpoint_is_kept(train, finished_run, tmp_path):
    """The learning rate breaks the model, so that what is held out is at its best in the beginning; two starts are as one."""
    flags = {
        "--rewards": "shapes",
        "--held_out_rewards": "aesthetic",
        "--learning_rate": 1e-2,
        "--checkpoint_every": 1,
        "--keep_checkpoints": 1,
    }
    run = tmp_path / "run"
    for iterations in (2, 4):
        train(run, flags, {"--iterations": iterations})
        held_out = [row["held_out/aesthetic_mean"] for row in metrics_of(run)]
        assert held_out[0] > max(sum(held_out[:count]) / count for count in range(2, iterations + 1))
        assert (run / "checkpoints" / "best").read_text() == "iteration_000001"
        assert names_in(run / "checkpoints") == {"best", "latest", "iteration_000001", f"iteration_{iterations:06d}"}
    assert names_in(finished_run / "checkpoints") == {"latest", "iteration_000002", "iteration_000004", "iteration_000006"}


@pytest.mark.slow
def test_a_run_stopped_by_a_collapse_goes_on(train, tmp_path):
    """Its checkpoint is whole. The same command stops again; with other arguments the run has a new chance."""
    run = tmp_path / "run"
    for iterations in (1, 2):
        assert train(run, {"--learning_rate": 1e-2}, "--stop_on_collapse", check=False).returncode == 2
        assert len(metrics_of(run)) == iterations
    result = train(run, {"--learning_rate": 1e-6}, "--stop_on_collapse", "--allow_changed_args")
    assert "policy explosion" not in result.stderr
    assert len(metrics_of(run)) == 3


@pytest.mark.slow
def test_best_checkpoint_is_exported(train, tmp_path):
    """As docs/clusters.md says: its name into `latest`, and the same command with --iterations its number."""
    flags = {
        "--rewards": "shapes",
        "--held_out_rewards": "aesthetic",
        "--learning_rate": 1e-2,
        "--checkpoint_every": 1,
        "--keep_checkpoints": 1,
    }
    run, short = tmp_path / "run", tmp_path / "short"
    train(run, flags, {"--iterations": 4})
    train(short, flags, {"--iterations": 1})
    assert largest_difference(weights_of(run / "export" / "transformer"), weights_of(short / "export" / "transformer")) > 0
    best = (run / "checkpoints" / "best").read_text()
    (run / "checkpoints" / "latest").write_text(best)
    train(run, flags, {"--iterations": int(best.removeprefix("iteration_"))})
    assert largest_difference(weights_of(run / "export" / "transformer"), weights_of(short / "export" / "transformer")) == 0


@pytest.mark.slow
def test_a_run_that_diverges_and_one_that_does_not(train, tmp_path):
    """With one update an iteration it cannot be seen how far the policy moves, only what comes of it: at the end of the second window."""
    flags = {"--rewards": "shapes", "--iterations": 2 * WINDOW, "--prompts_per_iteration": 4, "--updates_per_iteration": 1}
    for updates in (1, 2):
        healthy = train(tmp_path / f"healthy_{updates}", flags, {"--updates_per_iteration": updates}, "--stop_on_collapse")
        assert "warning: " not in healthy.stderr
    flags |= {"--iterations": 3 * WINDOW, "--checkpoint_every": 1, "--keep_checkpoints": 2 * WINDOW}
    run = tmp_path / "run"
    result = train(run, flags, {"--learning_rate": 1e-2}, "--stop_on_collapse", check=False)
    assert result.returncode == 2
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: reward collapse: reward/shapes_mean fell from ")
    assert len(metrics_of(run)) == 2 * WINDOW
    assert names_in(run / "checkpoints") == {"latest", *(f"iteration_{iteration:06d}" for iteration in range(1, 21))}
    assert (run / "checkpoints" / "latest").read_text() == "iteration_000020"

    earlier = re.search("write (iteration_[0-9]+) into", sentence)[1]
    assert 1 <= int(earlier.removeprefix("iteration_")) < WINDOW
    (run / "checkpoints" / "latest").write_text(earlier)
    train(run, flags, {"--learning_rate": 1e-6}, "--stop_on_collapse", "--allow_changed_args")
    assert [row["iteration"] for row in metrics_of(run)] == list(range(1, 3 * WINDOW + 1))
