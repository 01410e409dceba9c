"""docs/tutorial.md: its commands run as they are written, one after another in one shell."""

import json
import os
import re
import subprocess

import pytest
from conftest import ENVIRONMENT, REPOSITORY

FEWER = {"--iterations 40": "--iterations 2", "--sample_every 10": "--sample_every 1", "--images_per_prompt 8": "--images_per_prompt 1"}


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path):
    """With fewer iterations and pictures, in a folder that has all of the repository but runs/."""
    for entry in set(REPOSITORY.iterdir()) - {REPOSITORY / "runs"}:
        (tmp_path / entry.name).symlink_to(entry)
    page = (REPOSITORY / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    for text in (text for kind, text in blocks if kind == "python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", text)[1]).write_text(text)
    script = "".join(text for kind, text in blocks if kind == "bash")
    for written, fewer in FEWER.items():
        assert script.count(written) == 1
        script = script.replace(written, fewer)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "tutorial" / "colourful" / "evaluation" / "results.json").read_text())
    assert list(results["scores"]) == ["base", "shapes", "colourful"]
    report = (tmp_path / "runs" / "tutorial" / "report.html").read_text()
    assert "colourful (held out)" in report and report.count("data:image/png") == 5  # two grids of each run, one of the evaluation
    for scores in results["scores"].values():
        assert all(f"<td>{scores['prompts'][reward]['mean']:.4f} ± " in report for reward in ("shapes", "colourful"))
