"""Sequence parallelism is exact: a network split over processes has the outputs and gradients of the whole one."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_script
from sequence_parallel_worker import LENGTHS, SIZES, inputs, network, output_and_gradients, worst_error

from fastvideo.errors import UserError
from fastvideo.models.pretrained import add_lora
from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.networks import hunyuan
from fastvideo.parallel.sequence_parallel import SequenceGroup, share_tokens

WORKER = Path(__file__).with_name("sequence_parallel_worker.py")


@pytest.mark.parametrize(
    ("processes", "scope"), [(2, "odd"), pytest.param(2, "all", marks=pytest.mark.slow), pytest.param(4, "all", marks=pytest.mark.slow)]
)
def test_outputs_and_gradients_are_those_of_one_process(tmp_path, processes, scope):
    """In float64: five networks, heads and tokens that divide or not, few tokens, padded text, checkpointing."""
    result = run_script(WORKER, tmp_path / "errors.json", processes, scope, processes=processes, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == (3 * 3 + 2) * 2 * (1 if scope == "odd" else 2 * 3)
    for case, error in errors.items():
        assert error["output"] < 1e-12, case
        assert error["gradient"] < 1e-10, case
        assert error["parameters"] > 50, case


@pytest.mark.parametrize("lora", [False, True], ids=["all_weights", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["hunyuan", "skyreels", "hunyuan_i2v"])
def test_without_masks_outputs_and_gradients_are_diffusers(name, lengths, checkpointing, lora):
    """In float64, on one process: diffusers' network as it is, which masks what the other one leaves out."""
    arguments = inputs(name, SIZES["odd"], lengths)
    masked, cut = network(name, 3), network(name, 3)
    hunyuan.parallelize(cut, Ranks(0, 1, torch.device("cpu")))
    for model in (masked, cut):
        if lora:
            add_lora(model, rank=2, seed=0)
            torch.manual_seed(1)
            for weight in [weight for weight in model.parameters() if weight.requires_grad]:
                torch.nn.init.normal_(weight, std=0.3)  # they begin at 0
    if checkpointing:
        cut.enable_gradient_checkpointing()
    expected, expected_gradients = output_and_gradients(masked, arguments)
    output, gradients = output_and_gradients(cut, arguments)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) > (20 if lora else 50)
    assert (output - expected).abs().max() < 1e-12
    assert worst_error(gradients, expected_gradients) < 1e-12


def places(size: int) -> list[SequenceGroup]:
    """The groups that `size` processes would have, without processes."""
    groups = [SequenceGroup.__new__(SequenceGroup) for _ in range(size)]
    for rank, group in enumerate(groups):
        group.rank, group.size = rank, size
    return groups


@pytest.mark.parametrize(("count", "size"), [(7, 1), (7, 2), (8, 4), (3, 4), (0, 2)])
def test_shares(count, size):
    groups = places(size)
    items = torch.arange(count)
    assert torch.equal(torch.cat([items[group.own(count)] for group in groups]), items)
    assert [len(items[group.own(count)]) for group in groups] == groups[0].shares(count)
    assert max(groups[0].shares(count)) - min(groups[0].shares(count)) <= 1


def test_fewer_tokens_than_processes_are_refused():
    first = torch.nn.Identity()
    share_tokens(first, torch.nn.Identity(), places(3)[0])
    assert first(torch.zeros(2, 3, 4)).shape == (2, 1, 4)
    with pytest.raises(UserError, match="--sp_size 3 is more than the 2 tokens of a sample"):
        first(torch.zeros(2, 2, 4))


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (1, {"--sp_size": 2}, "--sp_size 2 does not divide the number of processes, 1"),
        (4, {"--sp_size": 4}, "--sp_size 4 is more than the 3 attention heads of FluxTransformer2DModel"),
        (2, {"--sp_size": 0}, "--sp_size is 0, but must be above 0"),
        (4, {"--sp_size": 2, "--prompts_per_iteration": 3}, "--prompts_per_iteration 3 does not divide among 4 processes in groups of 2"),
    ],
    ids=["one_process", "heads", "zero", "prompts"],
)
def test_what_cannot_be_shared_is_refused(train, tmp_path, processes, flags, message):
    result = train(tmp_path / "run", flags, processes=processes, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
