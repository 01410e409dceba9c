"""Sequence parallelism for diffusers' transformers, one file a model, by attention processors and hooks: their code stays as it is.

Each file has `parallelize(transformer, ranks)`: from then on the processes of `ranks.sp_group` share the image tokens inside
`transformer`, whose inputs and outputs stay whole. With sp_size 1 nothing happens. Raises UserError for fewer attention heads than sp_size.
"""

from torch import nn

from fastvideo.distributed import Ranks, UserError
from fastvideo.sequence_parallel import SequenceGroup


class SequenceParallelProcessor:
    """Base of attention processors that know with whom they share the tokens."""

    _attention_backend = None  # set by diffusers' set_attention_backend
    _parallel_config = None  # diffusers' own context parallelism: not used

    def __init__(self, group: SequenceGroup):
        self.group = group


def sequence_group(transformer: nn.Module, ranks: Ranks) -> SequenceGroup | None:
    """The processes that are to share the tokens of `transformer`, None if sp_size is 1. Raises UserError for fewer attention heads."""
    if ranks.sp_size == 1:
        return None
    heads = transformer.config.num_attention_heads
    if heads < ranks.sp_size:
        raise UserError(f"--sp_size {ranks.sp_size} is more than the {heads} attention heads of {type(transformer).__name__}")
    return SequenceGroup(ranks.sp_group)
