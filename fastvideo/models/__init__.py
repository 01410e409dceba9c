"""Sequence parallelism for diffusers' transformers, one file a model, by attention processors and hooks: their code stays as it is."""

from torch import nn

from fastvideo.distributed import UserError
from fastvideo.sequence_parallel import SequenceGroup


def check_heads(model: nn.Module, group: SequenceGroup) -> None:
    """Raise UserError if there are fewer attention heads than processes to share them."""
    if model.config.num_attention_heads < group.size:
        raise UserError(
            f"--sp_size {group.size} is more than the {model.config.num_attention_heads} attention heads of {type(model).__name__}"
        )
