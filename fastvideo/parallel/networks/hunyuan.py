"""Attention without masks, and sequence parallelism, for HunyuanVideo and SkyReels.

Flash kernels know no masks, and HunyuanVideo masks nothing but the padding at the end of each row's text. So the text is cut to the
longest of a batch, and where a row has less of it, attention is called on what it has.
"""

import itertools
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fastvideo.parallel.distributed import Ranks
from fastvideo.parallel.sequence_parallel import SequenceParallelProcessor, joint_attention, sequence_group, share_tokens


@lru_cache(maxsize=1)  # the steps of a rollout are given the same mask: the GPU is waited for in the first of them alone
def true_lengths(mask: torch.Tensor) -> tuple[int, ...]:
    """How many tokens each text has, which are its first ones. mask: (B, tokens); without contents, as in plans, it masks none."""
    if mask.is_meta or isinstance(mask, FakeTensor):
        return (mask.shape[1],) * len(mask)
    return tuple(mask.sum(1, dtype=torch.int).tolist())


def cut_text(transformer: HunyuanVideoTransformer3DModel) -> None:
    """Let `transformer` leave out text tokens that are padding in all rows, and tell its attention the lengths of the texts.

    They go with the tables of the rotary embedding, as a third of these: so each block has those of its own pass as an argument, also
    where a backward pass computes it again.
    """
    lengths = ()

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal lengths
        lengths = true_lengths(kwargs["encoder_attention_mask"])
        assert min(lengths) > 0, "a prompt without a token"
        return args, kwargs | {name: kwargs[name][:, : max(lengths)] for name in ("encoder_hidden_states", "encoder_attention_mask")}

    transformer.register_forward_pre_hook(cut, with_kwargs=True)
    transformer.rope.register_forward_hook(lambda module, args, tables: (*tables, lengths))


def attend_to_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], backend: str | None
) -> torch.Tensor:
    """Attention (B, tokens, H, D) among the first lengths[row] tokens of each row, and zeros for the others; no call has a mask.

    Rows of one length that follow each other are one call. Only what has no weights is called so often, for where ZeRO divides weights
    all processes must come to each layer equally often.
    """
    if min(lengths) == query.shape[1]:
        return dispatch_attention_fn(query, key, value, backend=backend)
    runs = [(length, len(list(rows))) for length, rows in itertools.groupby(lengths)]
    pieces = zip(*(tensor.split([count for _, count in runs]) for tensor in (query, key, value)))
    outputs = [
        dispatch_attention_fn(*(tensor[:, :length] for tensor in piece), backend=backend) for (length, _), piece in zip(runs, pieces)
    ]
    return torch.cat([F.pad(output, (0, 0, 0, 0, 0, query.shape[1] - output.shape[1])) for output in outputs])


class HunyuanProcessor(SequenceParallelProcessor):
    """diffusers' HunyuanVideoAttnProcessor2_0 without its masks, for this process's image tokens and all text tokens.

    The text comes last in HunyuanVideo's sequence. The rotary embedding has the rows of all image tokens, and behind them `cut_text`'s
    lengths of the texts, which take the mask's place.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor, tuple[int, ...]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *tables, text_lengths = image_rotary_emb
        num_image = len(tables[0])
        image_projections = attn.to_q, attn.to_k, attn.to_v
        query, key, value = (projection(hidden_states).unflatten(2, (attn.heads, -1)) for projection in image_projections)
        query, key = attn.norm_q(query), attn.norm_k(key)
        own = self.group.own(num_image) if self.group else slice(None)
        rows = [table[own] for table in tables]
        query, key = (apply_rotary_emb(tensor, rows, sequence_dim=1) for tensor in (query, key))

        separate = attn.add_q_proj is not None  # a double-stream block; in single-stream ones text and image have the same weights
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if separate else image_projections
        norm_query, norm_key = (attn.norm_added_q, attn.norm_added_k) if separate else (attn.norm_q, attn.norm_k)
        text = [projection(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for projection in projections]
        text = norm_query(text[0]), norm_key(text[1]), text[2]

        lengths = tuple(num_image + length for length in text_lengths)
        attend = partial(attend_to_lengths, lengths=lengths, backend=self._attention_backend)
        if self.group:
            image, text = joint_attention(attend, (query, key, value), text, num_image, self.group)
        else:
            whole = [torch.cat(parts, dim=1) for parts in zip((query, key, value), text)]
            image, text = attend(*whole).tensor_split([num_image], dim=1)
        image, text = image.flatten(2).to(query.dtype), text.flatten(2).to(query.dtype)
        if separate:
            image, text = attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)
        return image, text


def parallelize(transformer: HunyuanVideoTransformer3DModel, ranks: Ranks) -> None:
    """See `fastvideo.parallel.networks`. At any sp_size attention is called without masks."""
    group = sequence_group(transformer, ranks)
    blocks = *transformer.transformer_blocks, *transformer.single_transformer_blocks
    cut_text(transformer)
    for block in blocks:
        block.attn.set_processor(HunyuanProcessor(group))
    if group is None:
        return

    def own_first_frame(block: nn.Module, args: tuple) -> tuple:
        """How many of the first frame's tokens, which image-to-video blocks treat apart, are this process's."""
        *others, image_rotary_emb, token_replace_emb, first_frame = args
        own = group.own(len(image_rotary_emb[0]))
        return *others, image_rotary_emb, token_replace_emb, max(0, min(first_frame, own.stop) - own.start)

    for block in blocks:
        block.register_forward_pre_hook(own_first_frame)
    share_tokens(transformer.x_embedder, transformer.proj_out, group)
