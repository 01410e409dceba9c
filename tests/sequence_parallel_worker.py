"""Run by test_sequence_parallel.py on several processes: compares each network split over them with the same network whole.

    sequence_parallel_worker.py FILE PROCESSES all|odd

Writes one JSON object {case: {"output": error, "gradient": error, "parameters": number}} to FILE; "odd": only what does not divide.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel

from fastvideo.parallel import distributed
from fastvideo.parallel.networks import flux, hunyuan, wan

TEXT_LENGTH = 5
LENGTHS = (5, 5), (3, 5), (2, 2)  # of two samples: whole texts, one with padding, both
SIZES = {"even": (2, 4, 4), "odd": (3, 3, 3), "few": (1, 2, 2)}  # frames, rows, columns of image tokens
NETWORKS = {  # name -> (its parallelize, whether it has a text mask)
    "flux": (flux.parallelize, False),
    "hunyuan": (hunyuan.parallelize, True),
    "skyreels": (hunyuan.parallelize, True),
    "hunyuan_i2v": (hunyuan.parallelize, True),
    "wan": (wan.parallelize, False),
}


def network(name: str, heads: int) -> torch.nn.Module:
    """With random weights; biases, norms and gates too, which begin at 0 or 1 and would hide errors."""
    torch.manual_seed(0)
    shared = {"num_attention_heads": heads, "attention_head_dim": 16}
    if name == "flux":
        sizes = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
        model = FluxTransformer2DModel(**shared, **sizes, num_layers=1, num_single_layers=2, guidance_embeds=True)
    elif name == "wan":
        model = WanTransformer3DModel(**shared, in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=64, num_layers=2)
    else:
        sizes = {"text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 6, 6)}
        kind = {"guidance_embeds": name != "hunyuan_i2v", "image_condition_type": "token_replace" if name == "hunyuan_i2v" else None}
        sizes |= {"in_channels": 8 if name == "skyreels" else 4, "out_channels": 4, "num_refiner_layers": 1}
        model = HunyuanVideoTransformer3DModel(**shared, **sizes, **kind, num_layers=1, num_single_layers=2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().train()


def inputs(name: str, size: tuple[int, int, int], lengths: tuple[int, int]) -> dict[str, torch.Tensor]:
    """For two samples, whose texts have `lengths` tokens before their padding, if the network masks any."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(1)
    frames, rows, columns = size
    text = {"encoder_hidden_states": random(2, TEXT_LENGTH, 24)}
    if name == "flux":
        places = itertools.product(range(frames), range(rows), range(columns))
        ids = {"img_ids": torch.tensor(list(places)).double(), "txt_ids": torch.zeros(TEXT_LENGTH, 3).double()}
        cond = {"pooled_projections": random(2, 20), "timestep": random(2).abs(), "guidance": torch.full((2,), 3.5)}
        return text | ids | cond | {"hidden_states": random(2, frames * rows * columns, 16)}
    channels = 8 if name == "skyreels" else 4
    cond = {"hidden_states": random(2, channels, frames, 2 * rows, 2 * columns), "timestep": 1000 * random(2).abs()}
    if name != "wan":
        mask = torch.arange(TEXT_LENGTH) < torch.tensor(lengths)[:, None]
        cond |= {"encoder_attention_mask": mask.double(), "pooled_projections": random(2, 20)}
    if name in ("hunyuan", "skyreels"):
        cond["guidance"] = torch.full((2,), 6018.0)
    return text | cond


def output_and_gradients(model: torch.nn.Module, arguments: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**arguments, return_dict=False)[0]
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output - target).square().sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a parameter's gradient from the expected one, by the largest element of that; rounding counts as none."""
    differences = {name: (gradients[name] - gradient).abs().max().item() for name, gradient in expected.items()}
    return max(expected[name].abs().max().reciprocal().item() * error if error > 1e-14 else 0.0 for name, error in differences.items())


def main() -> None:
    torch.Tensor.float = torch.Tensor.double  # Wan computes its norms and gates in float32 whatever the weights are: not here
    world_size = int(sys.argv[2])
    ranks = distributed.init(sp_size=world_size, timeout_minutes=1)
    errors = {}
    numbers_of_heads, sizes = ((4, 7), SIZES) if sys.argv[3] == "all" else ((7,), ("odd",))
    for (name, (parallelize, has_mask)), heads, size in itertools.product(NETWORKS.items(), numbers_of_heads, sizes):
        for lengths, checkpointing in itertools.product(LENGTHS if has_mask else LENGTHS[:1], (False, True)):
            whole, split = network(name, heads), network(name, heads)
            parallelize(split, ranks)
            if checkpointing:
                split.enable_gradient_checkpointing()
            arguments = inputs(name, SIZES[size], lengths)
            expected, expected_gradients = output_and_gradients(whole, arguments)
            output, gradients = output_and_gradients(split, arguments)
            for gradient in gradients.values():  # over all processes, as ZeRO takes it
                dist.all_reduce(gradient.div_(world_size))
            case = f"{name}-{heads}_heads-{size}-{lengths[0]}+{lengths[1]}_text-{'checkpointing' if checkpointing else 'plain'}"
            row = {"output": (output - expected).abs().max().item(), "gradient": worst_error(gradients, expected_gradients)}
            row["parameters"] = len(expected_gradients)
            rows = distributed.all_gather_object(row)
            errors[case] = {key: max(row[key] for row in rows) for key in row}
            assert gradients.keys() == expected_gradients.keys()
    if ranks.is_main:
        Path(sys.argv[1]).write_text(json.dumps(errors, indent=1))


if __name__ == "__main__":
    distributed.run(main)
