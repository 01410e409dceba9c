"""The quickstart's recipe learns: 25 iterations raise the reward of prompts that it never asked for, and descent lowers it."""

import json
import statistics
from pathlib import Path

import pytest
from conftest import EVALUATE, MODEL, PROMPTS, REPOSITORY, TRAIN, run_script
from test_scripts import launched

# All that Algorithm 1 does, but with the other sign: the policy learns to be bad.
DESCENT = """
import train_grpo_flux
from fastvideo.parallel import distributed

grpo_loss = train_grpo_flux.grpo_loss

def negated(*arguments):
    loss, stats = grpo_loss(*arguments)
    return -loss, stats

train_grpo_flux.grpo_loss = negated
distributed.run(train_grpo_flux.main)
"""


def gains(folder: Path, script: Path, embeddings: Path) -> list[float]:
    """What a run of 25 iterations adds to the reward `shapes` on the held-out prompts, for each of 12 noise seeds."""
    _, recipe = launched(REPOSITORY / "scripts" / "quickstart.sh")
    flags = {"--embeddings": embeddings, "--output_dir": folder / "run", "--iterations": 25, "--sample_every": 0}
    result = run_script(script, *recipe, flags, processes=2, log=folder / "train")
    assert result.returncode == 0, result.stderr
    flags = {
        "--model": MODEL,
        "--checkpoints": f"trained={folder}/run/export",
        "--prompts": PROMPTS.with_name("heldout.txt"),
        "--rewards": "shapes",
    }
    flags |= {"--num_seeds": 12, "--images_per_prompt": 16, "--batch_size": 64, "--output_dir": folder / "evaluation"}
    result = run_script(EVALUATE, flags, processes=2, log=folder / "evaluate")
    assert result.returncode == 0, result.stderr
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    base, trained = (results["scores"][model]["prompts"]["shapes"]["seed_means"] for model in ("base", "trained"))
    return [after - before for before, after in zip(base, trained, strict=True)]


def standard_errors(values: list[float]) -> float:
    """How many standard errors the mean of independent values is above 0; that of a mean is the standard deviation / sqrt(n).

    Both models draw from the same noise, so that a seed's gain is a paired difference, and no other seed's noise is in it.
    """
    return statistics.mean(values) / (statistics.stdev(values) / len(values) ** 0.5)


@pytest.mark.slow
def test_the_quickstart_learns_and_descent_does_not(tmp_path):
    embeddings = tmp_path / "embeddings"
    flags = {"--model": MODEL, "--prompts": PROMPTS, "--output_dir": embeddings}
    result = run_script(REPOSITORY / "preprocess" / "embed_flux.py", flags, log=tmp_path / "embed")
    assert result.returncode == 0, result.stderr
    descent = tmp_path / "descent.py"
    descent.write_text(DESCENT)
    found = {}
    for name, script in {"ascent": TRAIN, "descent": descent}.items():
        (tmp_path / name).mkdir()
        found[name] = gains(tmp_path / name, script, embeddings)
        print(f"{name}: {statistics.mean(found[name]):+.4f}, {standard_errors(found[name]):+.1f} standard errors")
    assert standard_errors(found["ascent"]) > 3
    assert standard_errors(found["descent"]) < -3
