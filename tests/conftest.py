"""What the end-to-end tests share: launching the scripts, a cache of prompt embeddings, and one finished run.

A script is launched in either of two ways. `launch` gives its command to the system, as a user would. `train` and `run_script` fork it
from a server process that has imported the packages already, which saves some ten seconds a process; all after the imports is the same.
"""

import atexit
import functools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "shapes" / "models" / "flux"
PROMPTS = REPOSITORY / "shapes" / "prompts" / "train.txt"
TRAIN = REPOSITORY / "train_grpo_flux.py"
EVALUATE = REPOSITORY / "evaluate.py"

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what runs in pytest's own process; read when torch is imported

SMALL_RUN = {
    "--height": 32,
    "--width": 32,
    "--rewards": "aesthetic",
    "--iterations": 3,
    "--prompts_per_iteration": 2,
    "--num_generations": 4,
    "--updates_per_iteration": 2,
    "--sampling_steps": 5,
    "--micro_batch_size": 6,
    "--learning_rate": 1e-4,
    "--ema_decay": 0.5,
    "--checkpoint_every": 2,
    "--sample_every": 0,
    "--trackers": (),
}


def flag_list(*flags: object) -> list[str]:
    """Flags as a command line has them: a dict gives names and values, a tuple several values. Later flags override earlier ones."""
    words = []
    for flag in flags:
        for name, value in flag.items() if isinstance(flag, dict) else [(flag, ())]:
            words += [str(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@functools.cache
def tiny_model(family: str) -> Path:
    """Its trained folder in shapes/models; of a family that has none, one with random weights. Not to be changed."""
    trained = REPOSITORY / "shapes" / "models" / family
    if trained.is_dir():
        return trained
    from shapes.untrained import make

    folder = tempfile.mkdtemp(prefix="untrained-")
    atexit.register(shutil.rmtree, folder)
    make(family, Path(folder) / family)
    return Path(folder) / family


# ------------------------------------------------------------------------------------------- the command, as a user gives it


def command(script: Path, *flags: object, processes: int = 1) -> list[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, str(script), *flag_list(*flags)]


def launch(script: Path, *flags: object, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script by plain python, or by torchrun for several processes."""
    return subprocess.run(
        command(script, *flags, processes=processes),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---------------------------------------------------------------------------------------------- the same, forked and thus fast

FORK_SERVER = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the server, with the packages imported and on the CPU, unless it runs."""
    late_imports = ["torch.utils.tensorboard", "matplotlib.pyplot", "deepspeed.runtime.zero.muon.muon_optimizer"]
    FORK_SERVER.set_forkserver_preload(["train_grpo_flux", "evaluate", "pytest", *late_imports])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_in_fork(script: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """In a forked process: become `python script words...`, with stdout and stderr in the files log.stdout and log.stderr."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without


def start_forked(script: Path, *flags: object, processes: int = 1, log: Path) -> list[BaseProcess]:
    """Start a script on several processes with the environment that torchrun gives; returns at once."""
    start_fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = []
    for rank in range(processes):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launcher.items()} if processes > 1 else {}
        for name in ("stdout", "stderr"):
            Path(f"{log}.{rank}.{name}").write_text("")  # another's failure may end this process before it opens its own
        process = FORK_SERVER.Process(target=run_in_fork, args=(str(script), flag_list(*flags), environment, f"{log}.{rank}"))
        process.start()
        forked.append(process)
    return forked


def run_script(script: Path, *flags: object, processes: int = 1, log: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run a script to its end in forked processes. As under torchrun, the first that fails ends the others and gives the exit code."""
    forked = start_forked(script, *flags, processes=processes, log=log)
    deadline = time.monotonic() + timeout
    returncode = None
    while returncode is None:
        multiprocessing.connection.wait([process.sentinel for process in forked if process.exitcode is None], timeout=1)
        codes = [process.exitcode for process in forked]
        failed = [code for code in codes if code not in (None, 0)]
        if failed or None not in codes or time.monotonic() > deadline:
            returncode = failed[0] if failed else 0 if None not in codes else -signal.SIGALRM
    for process in forked:
        if process.exitcode is None:
            process.terminate()
        process.join()
    stdout, stderr = ("".join(Path(f"{log}.{rank}.{name}").read_text() for rank in range(processes)) for name in ("stdout", "stderr"))
    assert returncode != -signal.SIGALRM, f"no end within {timeout} s:\n{stderr}"
    return subprocess.CompletedProcess([str(script), *flag_list(*flags)], returncode, stdout, stderr)


# ------------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """Ten of the training prompts, of all kinds."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts = PROMPTS.read_text().splitlines()
    path.write_text("\n".join(prompts[:: len(prompts) // 10][:10]) + "\n")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory, prompt_file) -> Path:
    """Their embeddings, in three shards."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    flags = {"--model": MODEL, "--prompts": prompt_file, "--output_dir": path, "--shard_size": 4}
    result = run_script(REPOSITORY / "preprocess" / "embed_flux.py", flags, log=path.with_name("log"))
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def run_flags(cache):
    """Function from an output folder and further flags to those of a small run of a few seconds."""
    return lambda output_dir, *flags: ({"--model": MODEL, "--embeddings": cache, "--output_dir": output_dir} | SMALL_RUN, *flags)


@pytest.fixture(scope="session")
def train(run_flags):
    """Function that makes such a run, in forked processes; it must succeed unless `check` is False."""

    def train_script(output_dir: Path, *flags: object, processes: int = 1, script: Path = TRAIN, check: bool = True):
        log = output_dir.with_name(f"{output_dir.name}.log")
        result = run_script(script, *run_flags(output_dir, *flags), processes=processes, log=log)
        assert result.returncode == 0 or not check, result.stderr
        return result

    return train_script


@pytest.fixture(scope="session")
def finished_run(train, tmp_path_factory) -> Path:
    """A run of 6 iterations on one process, with checkpoints after 2, 4 and 6. Not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(run, {"--iterations": 6})
    return run


# ----------------------------------------------------------------------------------------------------------- what a run left


def metrics_of(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what is never the same twice: times and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "throughput/", "memory/"))} for row in rows]


def weights_of(folder: Path) -> dict:
    """All tensors of a model folder, such as RUN/export/transformer."""
    from safetensors.torch import load_file

    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    assert weights, f"no weights in {folder}"
    return weights


def largest_difference(one: dict, other: dict) -> float:
    """Largest absolute difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
