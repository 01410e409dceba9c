"""scripts/slurm.sh on a real SLURM of two nodes: requeue, preemption, the time limit, and what must not be started again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import cluster
import pytest
from conftest import ENVIRONMENT, MODEL, REPOSITORY, TRAIN, flag_list, metrics_of

from fastvideo.embeddings.cache import EmbeddingCache

pytestmark = pytest.mark.slurm


class Job:
    """A job of scripts/slurm.sh on both nodes."""

    def __init__(self, environment: dict[str, str], folder: Path, options: list[str], *words: object, **variables: str):
        self.environment = environment | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "LOGS": str(folder / "logs")} | variables
        self.log = folder / "job.out"
        submit = ["sbatch", "--parsable", "--nodes=2", f"--output={self.log}", *options, "scripts/slurm.sh", *map(str, words)]
        self.id = self.command(*submit).strip()

    def command(self, *words: str) -> str:
        result = subprocess.run(words, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def fields(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.command("scontrol", "show", "job", self.id).split() if "=" in word)

    def wait(self, condition, seconds: float = 150) -> None:
        """Until `condition(self.fields())`."""
        deadline = time.monotonic() + seconds
        while not condition(fields := self.fields()):
            assert time.monotonic() < deadline, f"{fields}\n{self.output}"
            assert fields["JobState"] not in ("FAILED", "CANCELLED"), self.output
            time.sleep(0.2)

    def end(self) -> str:
        """Wait for it, and give its state."""
        deadline = time.monotonic() + 240
        while (state := self.fields()["JobState"]) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.2)
        return state


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a private SLURM."""
    if os.getuid() != 0:
        pytest.skip("a private SLURM needs root")
    if missing := cluster.missing():
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install {cluster.PACKAGES}")
    with cluster.slurm(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment


def finished(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def send(run: Path, number: signal.Signals) -> None:
    """To the training processes of this run folder, both of them."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[1:3] == ["-u", TRAIN.name] and str(run) in words:
            processes.append(int(path.parent.name))
    assert len(processes) == 2
    for process in processes:
        os.kill(process, number)


def test_disturbed_job_is_the_undisturbed_run(slurm, train, run_flags, tmp_path):
    """Requeued, preempted without and with grace, and at its time limit: it resumes by itself, where it was, and is the same run.

    It is frozen before each of these, so that it does not end before SLURM acts; SLURM sends SIGCONT with its SIGTERM.
    """
    flags = {"--iterations": 16, "--checkpoint_every": 1000}
    run = tmp_path / "run"
    job = Job(slurm, tmp_path, ["--time=20", "--signal=B:USR1@180"], TRAIN.name, *flag_list(*run_flags(run, flags)))

    def disturb(how: str) -> None:
        begin = finished(run)
        job.wait(lambda fields: finished(run) >= begin + 2)
        send(run, signal.SIGSTOP)
        if how == "requeue":
            job.command("scontrol", "requeue", job.id)
        elif how == "preempt":
            job.command("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
        else:
            job.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=3")
            job.wait(lambda fields: "the time limit is near" in job.output)
            time.sleep(1)
            send(run, signal.SIGCONT)

    def resumed(restarts: int) -> None:
        job.wait(lambda fields: fields["Restarts"] == str(restarts))
        saved = finished(run)
        assert saved < flags["--iterations"], "it had ended before"
        job.wait(lambda fields: job.output.count("resuming from") == restarts)
        assert f"resuming from {run}/checkpoints/iteration_{saved:06d}\n" in job.output, "an iteration was lost"

    disturb("requeue")
    job.wait(lambda fields: fields["JobState"] == "PENDING")
    resumed(1)
    disturb("preempt")
    job.wait(lambda fields: fields["JobState"] == "PENDING")
    job.command("scontrol", "update", f"JobId={job.id}", "Partition=grace")
    resumed(2)
    disturb("preempt")
    job.wait(lambda fields: fields["JobState"] == "PENDING")
    assert "stopped by a signal: the job is queued again" in job.output
    resumed(3)
    disturb("time limit")
    job.wait(lambda fields: fields["JobState"] == "PENDING")
    assert "stopped near the time limit: the job is queued again" in job.output
    job.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    resumed(4)
    assert job.end() == "COMPLETED", job.output
    assert sorted(path.name for path in (tmp_path / "logs").glob("rank_*")) == ["rank_0.log", "rank_1.log"]

    train(tmp_path / "undisturbed", flags, processes=2)
    assert metrics_of(run) == metrics_of(tmp_path / "undisturbed")
    assert len(json.loads((run / "manifest.json").read_text())["history"]) == 4


def test_launch_scripts_run_on_all_nodes(slurm, cache, prompt_file, tmp_path):
    """scripts/preprocess_flux.sh with its settings: the cache is the one that the script makes alone."""
    made = tmp_path / "cache"
    flags = {"--dtype": "float32", "--max_sequence_length": 16, "--shard_size": 4}
    variables = {"MODEL": str(MODEL), "PROMPTS": str(prompt_file), "OUTPUT_DIR": str(made)}
    job = Job(slurm, tmp_path, [], "scripts/preprocess_flux.sh", *flag_list(flags), **variables)
    assert job.end() == "COMPLETED", job.output
    assert "2 x 1 processes" in job.output
    assert (tmp_path / "logs" / "rank_1.log").exists()
    assert EmbeddingCache(made).digest == EmbeddingCache(cache).digest


def test_crash_loop_ends(slurm, tmp_path):
    """Two starts that finish an iteration, then MAX_TRIES that do not; the error of the rank that failed is shown, not only rank 0's."""
    job = Job(slurm, tmp_path, [], "tests/slurm/crashing.py", "--output_dir", tmp_path / "run", MAX_TRIES="2")
    assert job.end() == "FAILED", job.output
    assert job.output.count("slurm.sh: start on") == 4, job.output
    last = job.output[job.output.index("2 starts in a row have finished no new iteration: giving up") :]
    assert "rank 1, which failed first (exit code 1)" in last
    assert "RuntimeError: out of widgets" in last
    assert job.fields()["Restarts"] == "0"


def test_mistake_ends_the_job_at_once(slurm, run_flags, tmp_path):
    words = flag_list(*run_flags(tmp_path / "run", {"--embeddings": tmp_path / "nowhere"}))
    job = Job(slurm, tmp_path, [], TRAIN.name, *words)
    assert job.end() == "FAILED", job.output
    assert job.output.count("slurm.sh: start on") == 1, job.output
    sentence = f"{tmp_path}/nowhere is not a finished embedding cache: it has no index.json"
    assert f"slurm.sh: not started again, which would end the same way: {sentence}" in job.output
    assert job.fields()["ExitCode"] == "2:0"
    assert "Traceback" not in job.output
