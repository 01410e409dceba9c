"""Sequence parallelism for Wan."""

from functools import partial

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.sequence_parallel import SequenceParallelProcessor, joint_attention, sequence_group, share_tokens


class WanProcessor(SequenceParallelProcessor):
    """diffusers' WanAttnProcessor for self-attention, for this process's tokens.

    The rotary embedding has the rows of the whole sequence. Cross-attention to the text keeps diffusers' processor: each process asks
    for its own rows, and all have the text.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        num_image = rotary_emb[0].shape[1]
        rows = [table[:, self.group.own(num_image)] for table in rotary_emb]
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)  # over all heads together
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        query, key = rotate(query, *rows), rotate(key, *rows)

        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        output, _ = joint_attention(attend, (query, key, value), None, num_image, self.group)
        return attn.to_out[1](attn.to_out[0](output.flatten(2).to(query.dtype)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, n, H, D), by tables (1, n, 1, D) that hold each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def parallelize(transformer: WanTransformer3DModel, ranks: Ranks) -> None:
    """See `fastvideo.parallel.networks`."""
    group = sequence_group(transformer, ranks)
    if group is None:
        return
    for block in transformer.blocks:
        block.attn1.set_processor(WanProcessor(group))
    # The patch embedding's output is shaped like a video. The transformer would flatten it next; flat already, it stays as it is.
    transformer.patch_embedding.register_forward_hook(lambda module, args, output: output.flatten(2))
    share_tokens(transformer.patch_embedding, transformer.proj_out, group, dim=2)
