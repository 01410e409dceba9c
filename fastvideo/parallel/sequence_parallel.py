"""Ulysses sequence parallelism: a group of processes shares the image tokens of each sample (https://arxiv.org/abs/2309.14509).

Between attentions a process holds its own rows of the image tokens, and all of the text tokens. For attention an all-to-all exchanges
rows for heads: each process attends over the whole sequence, in the order the model has it without sequence parallelism, for its own
heads. So masks mean what they meant, and no kernel knows of any of this. Any number of tokens will do, and any number of heads from
`size` up: where they do not divide, the first processes have one more.

The gradient rule. Every process of the group computes the same loss from the same gathered output. Each process's gradient of a
parameter then is only a part of the true one, from its own rows and heads; the true one is the sum over the group. DeepSpeed takes the
*mean* over all processes. So `gather_sequence` multiplies its gradient by the size of the group, once, and the mean is exact: at every
ZeRO stage, with nothing told to DeepSpeed. (Its own ways to be told, `mpu` and `mesh_param`, give wrong gradients here.)

Letters for shapes: B samples, N image tokens, n of them on this process, T text tokens, H heads, h of them on this process, D numbers
a head, P processes in the group.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from fastvideo.errors import UserError
from fastvideo.parallel.distributed import Ranks


class SequenceGroup:
    """The processes that share the tokens of each sample. rank: this one's place, 0 to size - 1."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> "SequenceGroup":
        return self  # a copy of a network belongs to the same processes

    def shares(self, count: int) -> list[int]:
        """How many of `count` tokens or heads each process has."""
        return [count // self.size + (rank < count % self.size) for rank in range(self.size)]

    def own(self, count: int) -> slice:
        """Which of `count` tokens or heads this process has."""
        shares = self.shares(count)
        start = sum(shares[: self.rank])
        return slice(start, start + shares[self.rank])


class _AllToAll(torch.autograd.Function):
    """Send consecutive pieces of a flat tensor, of `send` elements each, to the processes in turn; receive as many as `receive` says."""

    @staticmethod
    def forward(ctx, flat: torch.Tensor, send: list[int], receive: list[int], group: SequenceGroup) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = flat.new_empty(sum(receive))
        dist.all_to_all_single(received, flat.contiguous(), receive, send, group=group.group)
        return received

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _AllToAll.apply(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, num_tokens: int, group: SequenceGroup) -> torch.Tensor:
        ctx.own, ctx.size = group.own(num_tokens), group.size
        batch, _, channels = x.shape
        flat = x.transpose(0, 1).flatten()
        received = x.new_empty(num_tokens, batch, channels)
        receive = [share * batch * channels for share in group.shares(num_tokens)]
        # Copies sent by an all-to-all, because gloo has no all-gather of unequal shares; what passes here is small.
        dist.all_to_all_single(received.view(-1), flat.repeat(group.size), receive, [len(flat)] * group.size, group=group.group)
        return received.transpose(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient[:, ctx.own] * ctx.size, None, None  # the gradient rule above


def gather_sequence(x: torch.Tensor, num_tokens: int, group: SequenceGroup) -> torch.Tensor:
    """Collective. The network's output for all tokens, on every process: (B, n, C) -> (B, num_tokens, C).

    Its gradient is this process's rows times the size of the group: for outputs from which every process computes the same loss.
    """
    return _GatherSequence.apply(x, num_tokens, group)


def share_tokens(first: nn.Module, last: nn.Module, group: SequenceGroup, dim: int = 1) -> None:
    """Make the processes share the image tokens from the output of `first` on, where they lie along `dim`, to that of `last`.

    The output of `last`, (B, n, C), is gathered: (B, N, C). A forward pass raises UserError for fewer tokens than processes.
    """
    num_tokens = 0

    def split(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        nonlocal num_tokens
        num_tokens = output.shape[dim]
        if num_tokens < group.size:
            raise UserError(f"--sp_size {group.size} is more than the {num_tokens} tokens of a sample: sizes this small need none")
        own = group.own(num_tokens)
        return output.narrow(dim, own.start, own.stop - own.start)

    first.register_forward_hook(split)
    last.register_forward_hook(lambda module, args, output: gather_sequence(output, num_tokens, group))


def joint_attention(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    image: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    num_image: int,
    group: SequenceGroup,
    text_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Collective. Attention over the whole sequence of image and text tokens.

    attend: what the network would call with the whole sequence's query, key and value, (B, N + T, H, D) each, and whatever the number
        of heads; it is called with h of them.
    image, text: query, key and value of this process's image tokens, (B, n, H, D), and of all text tokens, (B, T, H, D).
    num_image: N. text_first: whether the network has the text before the image in its sequence.
    Returns attention's output for the same tokens, (B, n, H, D) and (B, T, H, D).

    Sends P - 1 of P parts of h * (4 N / P + T) * D * B elements from each process, and as many in the backward pass.
    """
    parts = [_rows_to_heads(image, num_image, group)]  # of (3, B, tokens, h, D)
    if text is not None:
        own_heads = group.own(text[0].shape[2])
        parts.append(torch.stack([tensor[:, :, own_heads] for tensor in text]))
    order = [1, 0] if text is not None and text_first else range(len(parts))
    whole = torch.cat([parts[index] for index in order], dim=2) if text is not None else parts[0]
    output = attend(*whole.unbind())
    outputs = output.split([parts[index].shape[2] for index in order], dim=1)
    num_heads = image[0].shape[2]
    image_output = _heads_to_rows(outputs[order.index(0)], num_heads, group)
    return image_output, None if text is None else _gather_heads(outputs[order.index(1)], num_heads, group)


def _rows_to_heads(image: tuple[torch.Tensor, ...], num_image: int, group: SequenceGroup) -> torch.Tensor:
    """Collective. K tensors (B, n, H, D) -> (K, B, N, h, D), in one all-to-all."""
    batch, rows, num_heads, head_dim = image[0].shape
    heads, shares = group.shares(num_heads), group.shares(num_image)
    element = len(image) * batch * head_dim
    flat = torch.stack([tensor.permute(2, 1, 0, 3) for tensor in image], dim=2).flatten()  # (H, n, K, B, D): whole heads in a row
    own_heads = heads[group.rank]
    receive = [own_heads * share * element for share in shares]
    received = _AllToAll.apply(flat, [count * rows * element for count in heads], receive, group).split(receive)
    pieces = [piece.view(own_heads, share, len(image), batch, head_dim) for piece, share in zip(received, shares)]
    return torch.cat(pieces, dim=1).permute(2, 3, 1, 0, 4)


def _heads_to_rows(output: torch.Tensor, num_heads: int, group: SequenceGroup) -> torch.Tensor:
    """Collective. (B, N, h, D) -> (B, n, H, D)."""
    batch, num_image, own_heads, head_dim = output.shape
    heads, shares = group.shares(num_heads), group.shares(num_image)
    rows, element = shares[group.rank], batch * head_dim
    flat = output.permute(1, 2, 0, 3).flatten()  # (N, h, B, D): each process's rows lie together
    receive = [rows * count * element for count in heads]
    received = _AllToAll.apply(flat, [share * own_heads * element for share in shares], receive, group).split(receive)
    pieces = [piece.view(rows, count, batch, head_dim) for piece, count in zip(received, heads)]
    return torch.cat(pieces, dim=1).permute(2, 0, 1, 3)


def _gather_heads(output: torch.Tensor, num_heads: int, group: SequenceGroup) -> torch.Tensor:
    """Collective. (B, T, h, D) -> (B, T, H, D): every process needs all of the text."""
    batch, num_text, _, head_dim = output.shape
    flat = output.permute(2, 1, 0, 3).flatten()
    receive = [count * num_text * batch * head_dim for count in group.shares(num_heads)]
    # Copies sent by an all-to-all, not an all-gather: its backward pass then sums what the processes' copies contribute.
    received = _AllToAll.apply(flat.repeat(group.size), [len(flat)] * group.size, receive, group)
    return received.view(num_heads, num_text, batch, head_dim).permute(2, 1, 0, 3)


class SequenceParallelProcessor:
    """Base of attention processors that know with whom they share the tokens; None: with nobody."""

    _attention_backend = None  # set by diffusers' set_attention_backend
    _parallel_config = None  # diffusers' own context parallelism: not used

    def __init__(self, group: SequenceGroup | None):
        self.group = group


def sequence_group(transformer: nn.Module, ranks: Ranks) -> SequenceGroup | None:
    """The processes that are to share the tokens of `transformer`, None if sp_size is 1. Raises UserError for fewer attention heads."""
    if ranks.sp_size == 1:
        return None
    heads = transformer.config.num_attention_heads
    if heads < ranks.sp_size:
        raise UserError(f"--sp_size {ranks.sp_size} is more than the {heads} attention heads of {type(transformer).__name__}")
    return SequenceGroup(ranks.sp_group)
