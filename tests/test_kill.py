"""SIGKILL at thirty random moments, as on a cluster that takes its machines away: nothing is lost since the last checkpoint, and what
comes out in the end is bit for bit what comes out undisturbed. The named moments, and signals that ask first, are in test_resume.py.
"""

import json
import random
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from conftest import MODEL, REPOSITORY, run_script, start_forked
from test_resume import assert_same_run, lines_of

from fastvideo.runs import integrity

EMBED = REPOSITORY / "preprocess" / "embed_flux.py"

# train_grpo_flux.py; rank 0 writes into the file PROGRESS when each phase begins.
RECORDED = """
import os, time
import train_grpo_flux
from fastvideo.parallel import distributed, zero
from fastvideo.runs import checkpoint, tracking

progress = open("PROGRESS", "a", buffering=1) if distributed.launch_rank() == 0 else open(os.devnull, "w")
phase = None

def begin(name):
    global phase
    if name != phase:
        phase = name
        progress.write(f"{name} {time.monotonic()}\\n")

def recorded(module, function, name):
    original = getattr(module, function)
    def call(*inputs, **options):
        begin(name)
        return original(*inputs, **options)
    setattr(module, function, call)

begin("start")
recorded(train_grpo_flux, "rollout", "rollout")
recorded(train_grpo_flux, "score_transitions", "update")
recorded(checkpoint, "save", "save")
recorded(checkpoint, "export", "export")
recorded(tracking, "plot_rewards", "end")
distributed.run(train_grpo_flux.main)
"""
PHASES = ("start", "rollout", "update", "save", "export")
DECK = (*PHASES, "rollout", "update", "save")  # which of them to aim at, in random order


def progress_of(path: Path) -> list[tuple[str, float]]:
    """(phase, when it began) of all that began so far; a line may be on its way."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(name, float(when)) for name, when in map(str.split, lines)]


def kill_at(forked: list, event, delay: float, draw: random.Random) -> bool:
    """Kill all processes `delay` seconds after `event()` has come true; False if they have ended by then."""
    while not event() and any(process.exitcode is None for process in forked):
        time.sleep(0.001)
    time.sleep(delay)
    for process in draw.sample(forked, len(forked)):
        process.kill()
    for process in forked:
        process.join()
    codes = {process.exitcode for process in forked}
    assert codes <= {-signal.SIGKILL, 0}, codes
    return -signal.SIGKILL in codes


@pytest.mark.slow
def test_training_killed_24_times(run_flags, tmp_path):
    kills = kill_training(run_flags, tmp_path, 16, 1) + kill_training(run_flags, tmp_path, 8, 2)
    print(f"killed in {dict(kills)}")
    assert kills.total() == 24
    assert kills.keys() >= set(PHASES)


def kill_training(run_flags, folder: Path, count: int, processes: int) -> Counter:
    """Runs that are killed `count` times altogether, each again and again until it ends; how many kills fell into each phase."""
    draw, kills, runs = random.Random(processes), Counter(), 0
    script, progress, log = folder / f"recorded_{processes}.py", folder / f"progress_{processes}", folder / "log"
    script.write_text(RECORDED.replace("PROGRESS", str(progress)))
    flags = {"--iterations": 4, "--checkpoint_every": 1, "--keep_checkpoints": 2}
    undisturbed = folder / f"undisturbed_{processes}"
    result = run_script(script, *run_flags(undisturbed, flags), processes=processes, log=log)
    assert result.returncode == 0, result.stderr
    seconds = {name: [] for name in (*PHASES, "end")}
    for (name, began), (_, ended) in pairwise(progress_of(progress)):
        seconds[name].append(ended - began)

    deck = []
    while kills.total() < count:
        runs += 1
        run, killed = folder / f"run_{processes}_{runs}", True
        while killed and kills.total() < count:
            deck = deck or draw.sample(DECK, len(DECK))
            phase, times = deck.pop(), draw.choice((1, 1, 2))
            times = 1 if phase in ("start", "export") else times
            progress.unlink()
            saved_before = saved_iteration(run)
            forked = start_forked(script, *run_flags(run, flags), processes=processes, log=log)
            killed = kill_at(
                forked,
                lambda phase=phase, times=times: [name for name, _ in progress_of(progress)].count(phase) >= times,
                draw.uniform(0, mean(seconds[phase])),
                draw,
            )
            if killed:
                kills[progress_of(progress)[-1][0]] += 1
                saved = saved_iteration(run)
                assert saved_before <= saved <= lines_of(run) <= saved + 1, (phase, saved_before, saved, lines_of(run))
        if killed:
            result = run_script(script, *run_flags(run, flags), processes=processes, log=log)
            assert result.returncode == 0, result.stderr
        assert_same_run(run, undisturbed)
    return kills


def saved_iteration(run: Path) -> int:
    """Of the checkpoint in force, which is whole."""
    checkpoint = integrity.latest(run / "checkpoints")
    return integrity.verify(checkpoint)["iteration"] if checkpoint else 0


@pytest.mark.slow
def test_embedding_killed_6_times(tmp_path):
    """At random moments, finished shards are kept, and the cache gets the same bytes."""
    draw = random.Random(0)
    (tmp_path / "prompts.txt").write_text("".join(f"{number} red circles\n" for number in range(200)))
    flags = {"--model": MODEL, "--prompts": tmp_path / "prompts.txt", "--shard_size": 1, "--batch_size": 1}
    undisturbed, cache = tmp_path / "undisturbed", tmp_path / "cache"
    assert run_script(EMBED, flags, {"--output_dir": undisturbed}, log=tmp_path / "log").returncode == 0
    finished = 0
    for target in sorted(draw.sample(range(40), 6)):
        forked = start_forked(EMBED, flags, {"--output_dir": cache}, log=tmp_path / "log")
        assert kill_at(forked, lambda n=target: cache.exists() and len(list(cache.glob("shard-*"))) >= n, draw.uniform(0, 0.02), draw)
        kept = len(list(cache.glob("shard-*")))
        assert kept >= finished and not (cache / "index.json").exists()
        finished = kept
    assert run_script(EMBED, flags, {"--output_dir": cache}, log=tmp_path / "log").returncode == 0
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    for path in undisturbed.glob("shard-*"):
        assert path.read_bytes() == (cache / path.name).read_bytes()
    assert index_of(cache) == index_of(undisturbed)


def index_of(cache: Path) -> dict:
    """index.json without the times at which the shards were written."""
    index = json.loads((cache / "index.json").read_text())
    return index | {"shards": [(shard["name"], shard["size"]) for shard in index["shards"]]}
