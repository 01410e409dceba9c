"""The published models at the paper's resolution and length: one rollout step and one update through the scripts' own functions.

Everything is a fake tensor, with a shape and a dtype but no memory, so 13 B parameters fit. Right there: shapes, dtypes, packing.
"""

import importlib

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode

import evaluate
from benchmarks.fake import FakeCache, PeakMemory, make_schedule
from benchmarks.full_size import MODELS
from fastvideo.models.families.family import Family
from fastvideo.parallel.distributed import Ranks


def in_bfloat16(kind: type, config: dict) -> torch.nn.Module:
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast afterwards
    try:
        return kind(**config)
    finally:
        torch.set_default_dtype(torch.float32)


QUICK = ("flux.1-dev", "hunyuan_video")


@pytest.mark.parametrize(
    "model", [pytest.param(model, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, model in MODELS.items()]
)
def test_a_rollout_and_an_update_at_full_size(model, tmp_path):
    module = importlib.import_module(model.script)
    args = module.Args(model=tmp_path, embeddings=tmp_path, output_dir=tmp_path, rewards=("aesthetic",), sampling_steps=2, **model.flags)
    schedule = make_schedule(module, args, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer, vae = (in_bfloat16(*parts) for parts in (model.network, model.vae))
        assert sum(parameter.numel() for parameter in transformer.parameters()) == model.parameters
        if model.family.parallelize:
            module.parallelize(transformer, Ranks(0, 1, torch.device("cpu")))
        transformer.train()
        vae.requires_grad_(False)
        assert module.latent_shape(transformer, vae, args) == model.latents
        cond = module.load_cond(FakeCache(model.cached, args.height, args.width), [0, 1], transformer, vae, args)

        z_1 = torch.randn(2, *model.latents)
        trained_steps = torch.zeros(2, 1, dtype=torch.long)
        generators = [torch.Generator(), torch.Generator()]
        levels = [args.noise_level, 0.0]
        trajectory, x0_hat = module.rollout(transformer, cond, z_1, schedule, levels, generators, trained_steps)
        assert trajectory["z_s"].shape == (2, 1, *model.latents) and trajectory["z_s"].dtype == torch.float32
        assert x0_hat.shape == (2, *model.latents) and x0_hat.dtype == torch.float32
        with torch.no_grad():
            media = module.decode(vae, x0_hat, args)
        assert media.shape == (2, *model.media) and media.dtype == torch.float32

        transitions, pair_cond = module.pick(trajectory, cond, torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        log_prob, _ = module.score_transitions(transformer, transitions, pair_cond, schedule)
        loss, _ = module.grpo_loss(log_prob, transitions["old_log_prob"], torch.ones(2), args.clip_range)
        loss.backward()
        missing = [name for name, parameter in transformer.named_parameters() if parameter.grad is None]
        assert missing == []
        assert all(parameter.grad.dtype == torch.bfloat16 for parameter in transformer.parameters())


def text_encoders(family: Family) -> int:
    """Parameters of the published ones."""
    with torch.device("meta"):
        classes = [(getattr(transformers, part.class_name), part.published) for part in family.text_encoders]
        made = [model_class(model_class.config_class(**settings)) for model_class, settings in classes]
    return sum(weight.numel() for encoder in made for weight in encoder.parameters())


# GiB to decode one sample in bfloat16, at most; of other models the sum alone is tested
DECODING = {"sd_v1.4": 0.4, "flux.1-dev": 0.8, "hunyuan_video": 8.6, "hunyuan_image": 1.5, "skyreels_i2v": 9.5, "wan_2.1_t2v_1.3b": 4.0}


@pytest.mark.parametrize(("name", "model"), MODELS.items(), ids=MODELS)
def test_what_evaluation_holds_while_it_decodes(name, model):
    """By default, in bfloat16: all networks and the decoding of a batch, below 80 GB with room for rewards and attention."""
    packed = model.family.packed
    latents = (model.latents[1] // 4, *(length // 8 for length in model.media[1:])) if packed else model.latents
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = in_bfloat16(*model.vae)
        with PeakMemory([*vae.parameters(), *vae.buffers()]) as memory, torch.no_grad():
            vae.decode(torch.randn(1, *latents, dtype=torch.bfloat16), return_dict=False)
    peak = memory.most / 2**30
    if name in DECODING:
        assert 0.7 * DECODING[name] < peak < DECODING[name]
    batch = evaluate.batch_size(len(model.media) == 3)
    networks = 2 * (model.parameters + sum(weight.numel() for weight in vae.parameters())) / 2**30
    together = networks + 2 * text_encoders(model.family) / 2**30 + batch * peak
    assert together < 65
