"""Sequence parallelism for FLUX."""

from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.sequence_parallel import SequenceParallelProcessor, joint_attention, sequence_group, share_tokens


class FluxProcessor(SequenceParallelProcessor):
    """diffusers' FluxAttnProcessor, for this process's image tokens and all text tokens; text comes first in FLUX's sequence.

    The rotary embedding has the rows of the whole sequence.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_image: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        num_text = len(image_rotary_emb[0]) - num_image
        query, key, value = (projection(hidden_states).unflatten(-1, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is None:  # single-stream block: the text is in hidden_states
            text, image = zip(*(tensor.tensor_split([num_text], dim=1) for tensor in (query, key, value)))
        else:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text = [projection(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for projection in projections]
            text = attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]
            image = query, key, value
        text_rows = [table[:num_text] for table in image_rotary_emb]
        image_rows = [table[num_text:][self.group.own(num_image)] for table in image_rotary_emb]
        text = *(apply_rotary_emb(tensor, text_rows, sequence_dim=1) for tensor in text[:2]), text[2]
        image = *(apply_rotary_emb(tensor, image_rows, sequence_dim=1) for tensor in image[:2]), image[2]

        attend = partial(dispatch_attention_fn, attn_mask=attention_mask, backend=self._attention_backend)
        image, text = joint_attention(attend, image, text, num_image, self.group, text_first=True)
        image, text = image.flatten(2).to(query.dtype), text.flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return torch.cat([text, image], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def parallelize(transformer: FluxTransformer2DModel, ranks: Ranks) -> None:
    """See `fastvideo.parallel.networks`."""
    group = sequence_group(transformer, ranks)
    if group is None:
        return
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(FluxProcessor(group))

    def tell_processors(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"joint_attention_kwargs": {"num_image": kwargs["hidden_states"].shape[1]}}

    transformer.register_forward_pre_hook(tell_processors, with_kwargs=True)
    share_tokens(transformer.x_embedder, transformer.proj_out, group)
