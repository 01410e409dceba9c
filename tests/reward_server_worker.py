"""A reward server with rewards of its own: run by tests/test_http_reward.py."""

import os
import signal
import time
from pathlib import Path

import torch

from fastvideo.parallel import distributed
from fastvideo.rewards import REWARDS, server
from fastvideo.rewards.preflight import UNCHECKED
from shapes.rewards import load_aesthetic


def load_gated(path, device):
    """The number of samples scored in the same call, once the files that the rows name as "gate" exist; and the number of calls so far.

    Whole part and hundredths.
    """
    calls = 0

    def gated(media, rows):
        nonlocal calls
        calls += 1
        deadline = time.monotonic() + 60
        while not all(Path(row["gate"]).exists() for row in rows if "gate" in row):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if any("fail" in row["prompt"] for row in rows):
            raise ValueError("this prompt fails")
        return torch.full((len(rows),), len(rows) + calls / 100)

    return gated


def load_mortal(path, device):
    """Aesthetic; its process dies when it is asked for the `path`-th batch of eight samples."""
    reward, batches = load_aesthetic(None, device), 0

    def mortal(media, rows):
        nonlocal batches
        batches += len(rows) == 8
        if batches == int(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return reward(media, rows)

    return mortal


def load_changing(path, device):
    return lambda media, rows: torch.rand(len(rows))


if __name__ == "__main__":
    REWARDS |= {"gated": load_gated, "mortal": load_mortal, "changing": load_changing}
    UNCHECKED |= {"gated", "mortal"}  # one changes at each call, the other takes 32 x 32 alone
    distributed.run(server.main)
