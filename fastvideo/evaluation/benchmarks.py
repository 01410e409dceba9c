"""What evaluate.py runs: a benchmark is prompts, the rewards that score them, and how its samples become one number."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, loaded: `evaluate.py` samples `images_per_prompt` of each row for each noise seed and scores them.

    rows: of the prompt file, each with "prompt" and what the rewards read. rewards: as `--rewards` takes them.
    group: the rows' field by which scores are reported apart too (a style, a kind of question), if any.
    total: the number of the whole: the mean over all samples, or the mean of the groups' means.
    """

    name: str
    rows: list[dict]
    rewards: tuple[str, ...]
    images_per_prompt: int
    group: str | None = None
    total: Literal["samples", "groups"] = "samples"
