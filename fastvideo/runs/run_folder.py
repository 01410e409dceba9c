"""Whose run folder it is: one run at a time, of the same arguments each time that it is started, all of it in manifest.json."""

import atexit
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fastvideo.errors import UserError, warn
from fastvideo.files import whole_file
from fastvideo.parallel.distributed import Ranks, on_main
from fastvideo.rewards.names import split_file
from fastvideo.runs import checkpoint, tracking

PACKAGES = ("torch", "diffusers", "transformers", "deepspeed", "peft", "safetensors")
# Flags that a resumed run may change: where things are, how the work is laid out, what is logged. All others change what is computed.
# --model and --rewards may name another place of the same file, and what --embeddings holds is compared, not where it is.
# fmt: off
FREE = {
    "embeddings", "output_dir", "iterations", "held_out_rewards", "zero_stage", "sp_size", "gather_for_rollout", "offload", "dtype",
    "attention", "gradient_checkpointing", "vae_tiling", "rollout_batch_size", "micro_batch_size", "timeout_minutes", "resume",
    "allow_changed_args", "stop_on_collapse", "checkpoint_every", "keep_checkpoints", "sample_every", "trackers",
}
# fmt: on


def enter(
    output_dir: Path, resume: Literal["auto", "never"], arguments: dict[str, Any], embeddings_digest: str, allow_changed_args: bool
) -> Path | None:
    """Collective. Take the folder for this run, and give the checkpoint that it goes on from, None for a new one.

    Raises UserError where another process has the folder; where there is a run but `resume` is "never"; for arguments that would change
    what the run computes, unless `allow_changed_args` is set, and then for those that the checkpoint decides; and for a checkpoint beyond
    the last iteration.
    """
    return on_main(lambda: _enter(output_dir, resume, arguments, embeddings_digest, allow_changed_args))


def _enter(output_dir: Path, resume: str, arguments: dict[str, Any], embeddings_digest: str, allow_changed_args: bool) -> Path | None:
    try:
        _lock(output_dir)
        if resume == "never" and any((output_dir / name).exists() for name in ("checkpoints/latest", "metrics.jsonl", "manifest.json")):
            raise UserError(f"--output_dir {output_dir} has a run in it and --resume is never: choose another folder")
        newest = checkpoint.latest(output_dir / "checkpoints")
        if newest:
            _check_arguments(output_dir, arguments, embeddings_digest, allow_changed_args)
            done = int(newest.name.removeprefix("iteration_"))
            if done > arguments["iterations"]:
                raise UserError(f"{newest} is at iteration {done}, beyond --iterations {arguments['iterations']}")
        elif (output_dir / "export").exists():
            raise UserError(f"--output_dir {output_dir} has a finished run whose checkpoints are gone: choose another folder")
        elif (output_dir / "metrics.jsonl").exists():
            warn(f"the run in {output_dir} was ended before its first checkpoint: it begins anew")
        tracking.check(output_dir, arguments["trackers"])
    except OSError as error:
        raise UserError(f"cannot use --output_dir {output_dir}: {error}") from error
    print(f"resuming from {newest}" if newest else f"a new run in {output_dir}")
    return newest


def write_manifest(
    output_dir: Path,
    script: str,
    arguments: dict[str, Any],
    embeddings_digest: str,
    sampling: dict[str, Any],
    iteration: int,
    ranks: Ranks,
) -> None:
    """Collective. `output_dir/manifest.json`: what is run, with what, and the sampling settings that evaluation should use.

    Its "history" has an entry for each earlier start, of what was not the same then.
    """

    def write() -> None:
        path = output_dir / "manifest.json"
        manifest = {
            "script": Path(script).name,
            "command": sys.argv,
            "arguments": arguments,
            "embeddings_digest": embeddings_digest,
            "sampling": sampling,
            "git": _git_revision(Path(script).resolve().parent),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "world_size": ranks.world_size,
            "sp_size": ranks.sp_size,
            "device": ranks.device.type,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "from_iteration": iteration,
            **_whereabouts(),
            "source": Path(script).read_text(),
        }
        manifest, history = json.loads(json.dumps(manifest)), []
        with suppress(UserError):  # none yet, or a damaged one without which the user goes on
            before = _read_manifest(path)
            history = before.pop("history", [])
            history.append({name: value for name, value in before.items() if name == "started" or manifest.get(name) != value})
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(manifest | {"history": history}, indent=2))

    on_main(write)


def _lock(output_dir: Path) -> None:
    """Hold `output_dir/lock` until this process ends. However it ends, the system drops the lock then: a file left over means nothing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "lock"
    while True:
        file = path.open("a+")  # stays open, as it is in `leave`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {output_dir} is in use by {_holder(path)}: wait for its end, or choose another folder") from None
        except OSError as error:
            warn(f"{output_dir} cannot be locked ({error.strerror}): make sure yourself that no other run uses it")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one who had it has just ended, and taken the file along

    # Some shared file systems lock within a host only. There another host's name in the file means a run, if SLURM still knows its job.
    left = _read_lock(path)
    job = left.get("job")
    if job and left.get("host") != socket.gethostname() and job != os.environ.get("SLURM_JOB_ID") and _is_running(job):
        raise UserError(f"--output_dir {output_dir} is in use by {_holder(path)}: wait for its end, or choose another folder")
    file.truncate(0)
    json.dump(_whereabouts() | {"since": datetime.now().astimezone().isoformat(timespec="seconds")}, file)
    file.flush()

    def leave() -> None:
        path.unlink(missing_ok=True)
        file.close()
        if not any(output_dir.iterdir()):  # the run was refused before it began
            output_dir.rmdir()

    atexit.register(leave)


def _whereabouts() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        left = json.loads(path.read_text())
    except (ValueError, RecursionError):  # its process is about to write it, or was killed before
        return {}
    return left if isinstance(left, dict) else {}


def _holder(path: Path) -> str:
    left = _read_lock(path)
    if not left.keys() >= {"pid", "host", "since"}:
        return "another process"
    job = f", SLURM job {left['job']}" if left.get("job") else ""
    return f"process {left['pid']} on {left['host']}{job}, since {left['since']}"


def _is_running(job: str) -> bool:
    if shutil.which("squeue") is None:
        return False
    answer = subprocess.run(["squeue", "--noheader", "--format=%T", "--jobs", job], capture_output=True, text=True, check=False)
    return any(state in ("RUNNING", "COMPLETING", "SUSPENDED") for state in answer.stdout.split())


def _git_revision(folder: Path) -> str | None:
    """The commit, "-dirty" behind it if there are changes that it does not have; None without git or a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    history = manifest.get("history", []) if isinstance(manifest, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in (manifest.get("arguments"), *history)):
        raise UserError(f"{path} is not the manifest of a run")
    return manifest


def _check_arguments(output_dir: Path, arguments: dict[str, Any], embeddings_digest: str, allow_changed_args: bool) -> None:
    """Compare with what the run in `output_dir` was last started with."""
    try:
        manifest = _read_manifest(output_dir / "manifest.json")
    except UserError as error:
        if not allow_changed_args:
            raise UserError(f"{error}, so arguments cannot be compared: --allow_changed_args goes on without") from error
        return warn(f"{error}, so arguments are not compared")
    before, now = manifest["arguments"], json.loads(json.dumps(arguments))
    same = [name for name in now if name in FREE or name not in before or _meaning(name, before[name]) == _meaning(name, now[name])]
    changes = {name: f"--{name} was {before[name]} and is {now[name]}" for name in now if name not in same}
    if manifest.get("embeddings_digest", embeddings_digest) != embeddings_digest:
        changes["embeddings"] = f"--embeddings was {before.get('embeddings')} and is {now['embeddings']}, which holds other embeddings"
    if not changes:
        return
    message = f"the run in {output_dir} was started with other arguments: {'; '.join(changes.values())}"
    if "lora_rank" in changes or ("ema_decay" in changes and 0 in (before["ema_decay"], now["ema_decay"])):
        raise UserError(f"{message}. The checkpoint holds a LoRA adapter or not, and an average or not: choose another --output_dir")
    if not allow_changed_args:
        raise UserError(f"{message}. Give the same ones, or another --output_dir; --allow_changed_args goes on with the new ones")
    warn(message)


def _meaning(name: str, value: Any) -> Any:
    """What must be the same: of model and rewards not where they are, only the last part of each path, and of a server nothing."""
    if name == "model" and isinstance(value, str):
        return Path(value).name
    if name == "rewards" and isinstance(value, list):
        return [_reward_meaning(str(text)) for text in value]
    return value


def _reward_meaning(text: str) -> str:
    file, text = split_file(text)
    if re.match(r"http(\.\w+)?=", text) and not file:
        text = re.sub(r",(patience|batch)=[^,@]*", "", re.sub(r"=[^,@]*", "=", text, count=1))
    return (f"{Path(file).name}:" if file else "") + re.sub(r"=[^=,]*/", "=", text)
