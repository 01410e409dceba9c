"""How a run starts: one process reads the network and the others take it from there; the reference of the KL divergence; Adam's state."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TRAIN, metrics_of, run_script, tiny_model

from fastvideo.models.families import FAMILIES
from fastvideo.parallel import reference
from fastvideo.parallel.shards import set_updates

MODELS = list(map(tiny_model, FAMILIES))
# Counts how often the reference's weights are taken to the device, in a run that is otherwise the script's own.
COUNTING = f"""
import runpy, sys
from contextlib import contextmanager
from fastvideo.parallel.reference import InitialWeights

applied = InitialWeights.applied

@contextmanager
def counted(self):
    print("the reference is used", flush=True)
    with applied(self) as model:
        yield model

InitialWeights.applied = counted
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("start")
    script = REPOSITORY / "tests" / "start_worker.py"
    run = run_script(script, folder / "output.json", *MODELS, processes=2, log=folder / "log", timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "output.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_process_has_the_network_that_one_has_read(started, model, dtype):
    rows = started[f"{model} {dtype}"]
    assert [row["meta"] for row in rows] == [False, True], "rank 1 has contents of its own before the engine"
    for row in rows:
        assert row["dtypes"] == row["expected_dtypes"]
        assert row["digest"] == row["expected_digest"] == rows[0]["digest"]


def test_the_reference_is_used_once_an_iteration(run_flags, tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    run = tmp_path / "run"
    flags = {"--kl_weight": 0.1, "--offload": (), "--zero_stage": 1, "--iterations": 2, "--old_log_prob": "recompute"}
    result = run_script(script, *run_flags(run, flags), log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the reference is used") == 2
    kl = [row["policy/kl"] for row in metrics_of(run)]
    assert len(kl) == 2 and 0 < kl[0] < kl[1], "of several updates, the first is at 0"


def test_the_reference_is_a_copy_in_pinned_memory_that_goes_to_the_device(monkeypatch):
    """And comes back by being forgotten there, not by being copied."""
    model = torch.nn.Linear(3, 2)
    initial = reference.InitialWeights(model)
    assert initial.model.weight.is_meta, "a second copy was made"
    monkeypatch.setattr(reference, "gathered", lambda engine: nullcontext())
    initial.fill(SimpleNamespace(module=model, device=torch.device("meta")), offload=True)
    kept, expected = initial.model.weight.data_ptr(), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    initial.device = torch.device("cpu")
    with initial.applied() as network:
        assert torch.equal(network.weight, expected) and not network.weight.requires_grad
    assert initial.model.weight.data_ptr() == kept


def test_resumed_fused_adam_counts_its_steps_where_its_weights_are():
    """CUDA's fused kernel refuses a count on the CPU, which the others want there."""
    for fused, device in ((True, "meta"), (False, "cpu")):
        shard = torch.nn.Parameter(torch.zeros(3, device="meta"))
        optimizer = torch.optim.AdamW([shard], lr=1.0)
        optimizer.defaults["fused"] = fused
        optimizer.param_groups[0]["fused"] = fused
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
        sharded = SimpleNamespace(single_partition_of_fp32_groups=[shard])
        set_updates(SimpleNamespace(basic_optimizer=optimizer, lr_scheduler=scheduler, optimizer=sharded), 7)
        assert optimizer.state[shard]["step"].device.type == device
