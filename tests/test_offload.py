"""DeepSpeed's CPU optimizer, for --offload: it is found or built in any shell, or what is missing is said before models are loaded."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, TRAIN, flag_list

CHECK = "import torch; from fastvideo.parallel import distributed, zero; distributed.run(lambda: zero.check_stage(1, True, torch.float32))"


def check(**environment: str) -> subprocess.CompletedProcess:
    """`zero.check_stage` with --offload, in a process that has these variables."""
    variables = os.environ | ENVIRONMENT | {"PYTHONPATH": str(TRAIN.parent)} | environment
    return subprocess.run([sys.executable, "-c", CHECK], env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder for PATH that has a compiler and what it needs, but no ninja: that of the environment is not activated."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for program in ("c++", "g++", "gcc", "cc", "as", "ld", "which", "sh", "uname", "lscpu"):
        if path := shutil.which(program):
            (folder / program).symlink_to(path)
    return folder


def test_the_environment_need_not_be_activated(tools):
    assert shutil.which("ninja", path=str(tools)) is None
    result = check(PATH=str(tools))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_it_is_built_in_another_folder(tools, tmp_path):
    result = check(PATH=str(tools), HOME="/dev/null", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "extensions").rglob("cpu_adam.so"))


@pytest.mark.slow
def test_home_that_cannot_be_written(tools):
    result = check(PATH=str(tools), HOME="/dev/null")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: --offload needs DeepSpeed's CPU optimizer, which cannot be built in /dev/null/.cache/torch_extensions" in result.stderr


def test_without_a_compiler(tmp_path):
    (tmp_path / "nothing").mkdir()
    result = check(PATH=str(tmp_path / "nothing"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: --offload needs DeepSpeed's CPU optimizer, which cannot be built in {tmp_path / 'extensions'}" in result.stderr


def test_lock_of_a_killed_build(tools, tmp_path):
    """torch waits for who holds it, without a word."""
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    result = check(PATH=str(tools), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{lock} was left 120 min ago by a build that was killed: delete it" in result.stderr


@pytest.mark.slow
def test_it_is_said_before_anything_is_loaded(run_flags, tmp_path):
    flags = flag_list(*run_flags(tmp_path / "run", {"--offload": (), "--model": tmp_path / "missing"}))
    variables = os.environ | ENVIRONMENT | {"HOME": "/dev/null"}
    result = subprocess.run([sys.executable, str(TRAIN), *flags], env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "--offload needs DeepSpeed's CPU optimizer" in result.stderr
