"""Sequence parallelism is exact: a network split over processes has the outputs and gradients of the whole one."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_script

from fastvideo.sequence_parallel import SequenceGroup

WORKER = Path(__file__).with_name("sequence_parallel_worker.py")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_are_those_of_one_process(tmp_path, processes):
    """In float64: five networks, heads and tokens that divide or not, few tokens, padded text, checkpointing."""
    result = run_script(WORKER, str(tmp_path / "errors.json"), str(processes), processes=processes, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == (3 * 2 + 2) * 2 * 3 * 2
    for case, error in errors.items():
        assert error["output"] < 1e-12, case
        assert error["gradient"] < 1e-10, case
        assert error["parameters"] > 50, case


@pytest.mark.parametrize(("count", "size"), [(7, 1), (7, 2), (8, 4), (3, 4), (0, 2)])
def test_shares(count, size):
    groups = [SequenceGroup.__new__(SequenceGroup) for _ in range(size)]
    for rank, group in enumerate(groups):
        group.rank, group.size = rank, size
    items = torch.arange(count)
    assert torch.equal(torch.cat([items[group.own(count)] for group in groups]), items)
    assert [len(items[group.own(count)]) for group in groups] == groups[0].shares(count)
    assert max(groups[0].shares(count)) - min(groups[0].shares(count)) <= 1


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (1, {"--sp_size": 2}, "--sp_size 2 does not divide the number of processes, 1"),
        (4, {"--sp_size": 4}, "--sp_size 4 is more than the 3 attention heads of FluxTransformer2DModel"),
        (2, {"--sp_size": 2, "--height": 8, "--width": 8}, "--sp_size 2 is more than the 1 tokens of a sample"),
        (2, {"--sp_size": 0}, "--sp_size is 0, but must be above 0"),
        (4, {"--sp_size": 2, "--prompts_per_iteration": 3}, "--prompts_per_iteration 3 does not divide among 4 processes in groups of 2"),
    ],
    ids=["one_process", "heads", "tokens", "zero", "prompts"],
)
def test_what_cannot_be_shared_is_refused(train, tmp_path, processes, flags, message):
    result = train(tmp_path / "run", flags, processes=processes, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
