"""No process computes on the CPU by mistake: what a GPU host with a missing CUDA looks like is made from a folder and variables."""

from pathlib import Path

import pytest
import torch
from conftest import EVALUATE, MODEL, REPOSITORY, TRAIN, run_script

from fastvideo.parallel import devices

# worker.py RANK_0 RANK_1: two processes that meet, each on a host of this kind.
# worker.py RANK_0 RANK_1 SCRIPT WORDS...: a script of ours there.
WORKER = """
import os, runpy, socket, sys
from pathlib import Path
from unittest import mock
import torch
from fastvideo.parallel import devices, distributed

def main():
    print(distributed.init(timeout_minutes=1).device)

devices.CPU_ASKED = False
rank = distributed.launch_rank()
devices.DEV = Path("FOLDER", str(rank))
devices.DEV.mkdir()
kind = sys.argv[1 + rank]
socket.gethostname = lambda: f"node{rank}"
if kind == "broken":
    (devices.DEV / "nvidia0").touch()
elif kind == "few":
    os.environ["LOCAL_RANK"] = "1"
if kind in ("gpu", "few"):
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
if len(sys.argv) == 3:
    distributed.run(main)
del sys.argv[:3]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.fixture
def worker(tmp_path) -> Path:
    (tmp_path / "dev").mkdir()
    path = tmp_path / "worker.py"
    path.write_text(WORKER.replace("FOLDER", str(tmp_path / "dev")))
    return path


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("cpu", "broken"), "rank 1 on node1: there are GPUs ("),
        (("gpu", "cpu"), "rank 1 on node1 computes on the CPU, rank 0 on node0 on a GPU"),
        (("gpu", "few"), "rank 1 on node1: LOCAL_RANK 1 has no GPU, of which 1 can be seen here"),
        (("cpu", "cpu"), None),
    ],
)
def test_all_processes_refuse_together(worker, tmp_path, kinds, expected):
    result = run_script(worker, *kinds, processes=2, log=tmp_path / "log", timeout=60)
    if expected is None:
        assert (result.returncode, result.stdout) == (0, "cpu\ncpu\n"), result.stderr
        return
    assert result.returncode == 2
    [sentence] = errors(result.stderr)
    assert sentence.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    "script", [TRAIN, EVALUATE, REPOSITORY / "preprocess" / "embed_flux.py", REPOSITORY / "preprocess" / "make_reference_images.py"]
)
def test_every_script_refuses(worker, run_flags, cache, prompt_file, tmp_path, script):
    output = tmp_path / "output"
    flags = {"--model": MODEL, "--prompts": prompt_file, "--output_dir": output}
    if script == TRAIN:
        flags, *_ = run_flags(output)
    elif script == EVALUATE:
        flags |= {"--rewards": "aesthetic"}
    elif script.name == "make_reference_images.py":
        flags |= {"--height": 32, "--width": 32}
    result = run_script(worker, "broken", "broken", script, flags, log=tmp_path / "log")
    assert result.returncode == 2, result.stderr
    assert "there are GPUs (" in errors(result.stderr)[0]
    assert not output.exists()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """One without GPUs, whatever this one is."""
    monkeypatch.setattr(devices, "CPU_ASKED", False)
    monkeypatch.setattr(devices, "DEV", tmp_path)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "gpus"),
    [
        ("SLURM_GPUS_ON_NODE", "8", True),
        ("SLURM_GPUS_ON_NODE", "0", False),
        ("SLURM_JOB_GPUS", "0,1", True),
        ("CUDA_VISIBLE_DEVICES", "0", True),
        ("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43", True),
        ("CUDA_VISIBLE_DEVICES", "", False),
        ("CUDA_VISIBLE_DEVICES", "-1", False),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles", False),
    ],
)
def test_variables_that_promise_gpus(host, monkeypatch, name, value, gpus):
    assert devices.own_fault() == ""
    monkeypatch.setenv(name, value)
    assert (f"{name}={value}" in devices.own_fault()) == bool(devices.own_fault()) == gpus
    monkeypatch.setattr(devices, "CPU_ASKED", True)
    assert devices.own_fault() == ""


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)", "570.86.15"),
    ],
)
def test_sentence_says_what_does_not_fit(host, monkeypatch, line, driver):
    (host / "nvidia0").touch()
    (host / "nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert f"({host}/nvidia0), but PyTorch {torch.__version__}, built for CUDA 13.0, finds none (no driver's" in devices.own_fault()
    (host / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert f"finds none (the driver is {driver}): " in devices.own_fault()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert f"(the driver is {driver}, CUDA_VISIBLE_DEVICES is ''): " in devices.own_fault()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs only" in devices.own_fault()


@pytest.mark.parametrize(("local_rank", "refused"), [("1", False), ("2", True)])
def test_more_processes_than_gpus(host, monkeypatch, local_rank, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert bool(devices.own_fault()) == refused
