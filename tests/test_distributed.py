"""The process group of a GPU host, with another backend in the place of NCCL; and who says an error that all processes have."""

import json

import pytest
import torch
from conftest import run_script

# worker.py OUTPUT: two processes that believe to have a GPU each. "cuda:standin" is a backend whose collectives can be counted.
WORKER = """
import json, sys
from unittest import mock
import torch, torch.distributed as dist
from fastvideo.parallel import devices, distributed, zero
from fastvideo.parallel.distributed import all_gather_object

def create_standin(store, rank, world_size, timeout):
    return dist.ProcessGroupGloo(store, rank, world_size, timeout)

dist.Backend.register_backend("standin", create_standin, devices=["cuda"])
init_process_group, settings = dist.init_process_group, {}

def with_standin(backend, device_id, **others):
    settings.update(backend=backend, device=str(device_id), timeout=others["timeout"].total_seconds())
    init_process_group(backend.replace("nccl", "standin"), **others)

def counts(group):
    return [group._get_backend(torch.device(kind))._get_sequence_number_for_group() for kind in ("cpu", "cuda")]

def describe(group):
    backends = [group._get_backend(torch.device(kind)) for kind in ("cpu", "cuda")]
    return {"distinct": backends[0] is not backends[1], "timeouts": [backend.options._timeout.total_seconds() for backend in backends]}

def main():
    # In this order: importing DeepSpeed decided for the CPU.
    with (
        mock.patch.object(devices, "CPU_ASKED", False),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        mock.patch.object(torch.cuda, "set_device", lambda index: settings.update(set_device=index)),
        mock.patch.object(torch.cuda, "current_device", lambda: settings["set_device"]),
        mock.patch.object(dist, "init_process_group", with_standin),
    ):
        ranks = distributed.init(2, timeout_minutes=1.5)
    before = counts(dist.group.WORLD)
    row = lambda place: torch.full((1, 2, 3), place + 0.5, dtype=torch.bfloat16)
    own = {0: row(0), 3: row(3)} if ranks.is_main else {1: row(1), 2: row(2)}
    collected = distributed.collect_on_main(own, [0, 1, 1, 0])
    results = {
        "settings": settings,
        "ranks_device": str(ranks.device),
        "objects": all_gather_object(ranks.rank),
        "together": distributed.together(lambda: "value"),
        "on_main": distributed.on_main(lambda: "main's"),
        "collected": None if collected is None else collected[:, 0, 0].tolist(),
        "collected_shape": None if collected is None else [*collected.shape],
    }
    after = counts(dist.group.WORLD)
    results["gloo_began"], results["standin_began"] = after[0] - before[0], after[1] - before[1]
    engine = zero.initialize(torch.nn.Linear(2, 2), stage=2, offload=False, dtype=torch.float32, learning_rate=0.1, weight_decay=0.0,
        lr_multiplier=lambda update: 1.0, max_grad_norm=0.0, micro_batch_size=1, accumulation_steps=1)
    x = torch.full((1, 2), 1.0 + ranks.rank)
    results["norm"] = zero.backward_and_step(engine, engine(x).sum())
    results["groups"] = [describe(group) for group in dist.distributed_c10d._world.pg_map]
    if ranks.is_main:
        open(sys.argv[1], "w").write(json.dumps(results))

distributed.run(main)
"""


def test_gpus_have_gloo_beside_nccl(tmp_path):
    script, output = tmp_path / "worker.py", tmp_path / "results.json"
    script.write_text(WORKER)
    run = run_script(script, output, processes=2, log=tmp_path / "log", timeout=120)
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text())
    assert results["settings"] == {"set_device": 0, "backend": "cpu:gloo,cuda:nccl", "device": "cuda:0", "timeout": 90.0}
    assert results["ranks_device"] == "cuda:0"
    assert results["objects"] == [0, 1]
    assert (results["together"], results["on_main"]) == ("value", "main's")
    assert results["collected"] == [0.5, 1.5, 2.5, 3.5]
    assert results["collected_shape"] == [4, 2, 3]
    assert results["gloo_began"] > 0
    assert results["standin_began"] == 0
    # y = W x + b, summed: dy/dW is (x, x) in both rows, dy/db is 1, 1; x is 1 and 2 on the two processes, 1.5 on average.
    assert abs(results["norm"] - torch.tensor([1.5, 1.5, 1.5, 1.5, 1, 1]).norm().item()) < 1e-5
    assert len(results["groups"]) == 3, "of all, of sequence parallelism, of DeepSpeed"
    assert results["groups"] == 3 * [{"distinct": True, "timeouts": [90.0, 90.0]}]


# late.py MOMENT: two processes have the same error. Rank 0 comes to it late, or has said it and takes long to end, as on a busy machine.
LATE = """
import atexit, sys, time
from fastvideo.parallel import distributed

def main():
    late = distributed.launch_rank() == 0
    if sys.argv[1] == "joined":
        distributed.init(timeout_minutes=1)
        if late:
            atexit.register(time.sleep, 15)
    elif late:
        time.sleep(15)
    raise distributed.UserError("a mistake that all see")

distributed.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "joined"])
def test_an_error_of_all_is_said_once(tmp_path, moment):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    run = run_script(script, moment, processes=2, log=tmp_path / "log", timeout=120)
    assert run.returncode == 2
    assert run.stderr == "error: a mistake that all see\n"
