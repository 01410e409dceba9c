"""Exponential moving average of the weights, on the shards that each process updates: nothing is ever gathered."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine

from fastvideo.parallel.shards import master_shards, refresh_weights


class EMA:
    """Averages the float32 master weights: average = decay * average + (1 - decay) * weights, at each `update`.

    shards: the average, in the layout of `master_shards`.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self.engine = engine
        self.decay = decay
        self.shards = [shard.clone() for shard in master_shards(engine)]

    def update(self) -> None:
        torch._foreach_lerp_(self.shards, master_shards(self.engine), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Collective. Inside, the network runs with the averaged weights; on leaving, with its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, live in zip(self.shards, master_shards(self.engine)):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
        refresh_weights(self.engine)
