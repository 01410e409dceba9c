"""Sequence parallelism for HunyuanVideo and SkyReels."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.sequence_parallel import SequenceParallelProcessor, joint_attention, sequence_group, share_tokens


class HunyuanProcessor(SequenceParallelProcessor):
    """diffusers' HunyuanVideoAttnProcessor2_0, for this process's image tokens and all text tokens.

    The text comes last in HunyuanVideo's sequence. The rotary embedding has the rows of all image tokens; the mask is that of this
    process's image tokens, which are never masked, and of the text.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_image = len(image_rotary_emb[0])
        image_projections = attn.to_q, attn.to_k, attn.to_v
        query, key, value = (projection(hidden_states).unflatten(2, (attn.heads, -1)) for projection in image_projections)
        query, key = attn.norm_q(query), attn.norm_k(key)
        rows = [table[self.group.own(num_image)] for table in image_rotary_emb]
        query, key = (apply_rotary_emb(tensor, rows, sequence_dim=1) for tensor in (query, key))

        separate = attn.add_q_proj is not None  # a double-stream block; in single-stream ones text and image have the same weights
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if separate else image_projections
        norm_query, norm_key = (attn.norm_added_q, attn.norm_added_k) if separate else (attn.norm_q, attn.norm_k)
        text = [projection(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for projection in projections]
        text = norm_query(text[0]), norm_key(text[1]), text[2]

        mask = F.pad(attention_mask, (num_image - hidden_states.shape[1], 0), value=True)  # of the whole sequence
        attend = partial(dispatch_attention_fn, attn_mask=mask, backend=self._attention_backend)
        image, text = joint_attention(attend, (query, key, value), text, num_image, self.group)
        image, text = image.flatten(2).to(query.dtype), text.flatten(2).to(query.dtype)
        if separate:
            image, text = attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)
        return image, text


def parallelize(transformer: HunyuanVideoTransformer3DModel, ranks: Ranks) -> None:
    """See `fastvideo.parallel.networks`."""
    group = sequence_group(transformer, ranks)
    if group is None:
        return

    def own_first_frame(block: nn.Module, args: tuple) -> tuple:
        """How many of the first frame's tokens, which image-to-video blocks treat apart, are this process's."""
        *others, image_rotary_emb, token_replace_emb, first_frame = args
        own = group.own(len(image_rotary_emb[0]))
        return *others, image_rotary_emb, token_replace_emb, max(0, min(first_frame, own.stop) - own.start)

    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(HunyuanProcessor(group))
        block.register_forward_pre_hook(own_first_frame)
    share_tokens(transformer.x_embedder, transformer.proj_out, group)
