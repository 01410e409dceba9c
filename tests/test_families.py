"""Every model but FLUX: from prompts to an evaluated export, a ratio of 1, and noise 0 as in its pipeline.

A model of fastvideo/models/families is tested here without a line of its own. (FLUX has these tests in test_train_flux.py, with those of
what all scripts share.)
"""

import importlib
import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EVALUATE, REPOSITORY, SMALL_RUN, largest_difference, metrics_of, run_script, tiny_model, weights_of
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from evaluate import media_of, pipeline_arguments, use_trained_sampler
from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.models.families import FAMILIES
from fastvideo.models.families.family import Family
from fastvideo.parallel.distributed import Ranks, keyed_generator

PROMPTS = REPOSITORY / "shapes" / "prompts"


@dataclass(frozen=True)
class Case:
    """A family of FAMILIES, and flags of its training."""

    name: str
    flags: dict

    @property
    def facts(self) -> Family:
        return FAMILIES[self.name]

    @property
    def clips(self) -> bool:
        return self.flags.get("--num_frames", 1) > 1

    @property
    def prompts(self) -> str:
        return "i2v_train.jsonl" if self.facts.from_images else "video_train.txt" if self.clips else "train.txt"

    @property
    def trained(self) -> bool:
        """Whether its tiny model draws objects."""
        return self.model.parent == REPOSITORY / "shapes" / "models"

    @property
    def rewards(self) -> tuple[str, ...]:
        if not self.trained:
            return ("aesthetic",)  # it tells samples apart that show none
        return ("motion", "fidelity" if self.facts.from_images else "visual") if self.clips else ("aesthetic", "shapes")

    @property
    def model(self) -> Path:
        return tiny_model(self.name)

    @property
    def network(self) -> str:
        return self.facts.network_folder

    @property
    def ddim(self) -> bool:
        return "shift" not in self.facts.sampling

    @property
    def script(self) -> Path:
        return REPOSITORY / f"train_grpo_{self.name}.py"


def flags_of(facts: Family) -> dict:
    found = {"--guidance_scale": 2} if "guidance_scale" in facts.sampling else {}
    found |= {"--num_frames": 9} if "num_frames" in facts.sampling else {}
    return found if "shift" in facts.sampling else found | {"--noise_level": 1}


# What some model is to be trained with, besides.
# DDIM's late transitions have little noise when it decays too, and divide rounding errors by it: docs/paper_to_code.md has the advice.
OTHERS = {
    "sd": {"--kl_weight": 0.01, "--noise_schedule": "decay", "--sde_window": (0, 3)},
    "hunyuan": {"--vae_tiling": ()},
    "skyreels": {"--lora_rank": 4},
}
OTHERS["wan"] = {"--noise_schedule": "flow_grpo"}
CASES = {name: Case(name, flags_of(facts) | OTHERS.get(name, {})) for name, facts in FAMILIES.items() if name != "flux"}
CASES["hunyuan_t2i"] = Case("hunyuan", {"--num_frames": 1, "--gradient_checkpointing": ()})
pytestmark = pytest.mark.parametrize("family", CASES.values(), ids=CASES, scope="module")


@pytest.fixture(scope="module")
def cache(family, tmp_path_factory) -> Path:
    """Embeddings of eight of the family's prompts."""
    folder = tmp_path_factory.mktemp("cache")
    lines = (PROMPTS / family.prompts).read_text().splitlines()
    rows = [json.loads(line) if line.startswith("{") else {"prompt": line} for line in lines[:: len(lines) // 8][:8]]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row | ({"image": str(PROMPTS / row["image"])} if "image" in row else {})) + "\n" for row in rows))
    flags = {"--model": family.model, "--prompts": prompts, "--output_dir": folder / "cache"}
    flags |= {"--height": 32, "--width": 32} if family.facts.from_images else {}
    result = run_script(REPOSITORY / "preprocess" / f"embed_{family.name}.py", flags, log=folder / "log")
    assert result.returncode == 0, result.stderr
    return folder / "cache"


def test_the_cache_has_what_the_facts_say(family, cache):
    found = EmbeddingCache(cache)
    shapes = {name: tensor[0].ndim for name, tensor in found.get([0]).items()}
    assert shapes == {name: len(shape) for name, shape in family.facts.cached.items()}
    assert ("max_sequence_length" in found.fingerprint) == ("max_sequence_length" in family.facts.sampling)


@pytest.fixture(scope="module")
def policy(family, cache):
    """The script as a module, and its models, prompts and arguments for sampling, without an engine around them."""
    module = importlib.import_module(family.script.stem)
    values = {name.removeprefix("--"): value for name, value in family.flags.items() if name in ("--num_frames", "--guidance_scale")}
    values |= {"model": family.model, "embeddings": cache, "output_dir": cache, "rewards": family.rewards}
    # DDIM's last trained step has a standard deviation of 0.04 and multiplies the rounding of float32, more so with fewer steps.
    steps, noise_level = (20, 1.0) if family.ddim else (6, 0.7)
    args = module.Args(**values, sampling_steps=steps, height=32, width=32, noise_level=noise_level)
    transformer, vae = module.load_models(args, torch.float32, Ranks(0, 1, torch.device("cpu")))
    schedule = module.time_schedule(args.sampling_steps, args.model if family.ddim else args.shift)
    return module, args, transformer, vae, EmbeddingCache(cache), schedule


def initial_noise(module, transformer, vae, args, number: int) -> torch.Tensor:
    shape = module.latent_shape(transformer, vae, args)
    return torch.stack([torch.randn(shape, generator=keyed_generator(0, "z_1", i)) for i in range(number)])


@pytest.mark.parametrize(("rollout_batch_size", "micro_batch_size"), [(1, 3), (3, 8), (8, 1), (8, 8)])
def test_ratio_is_1_before_the_first_update(policy, family, rollout_batch_size, micro_batch_size):
    """Rollout and update batches of any size give one log-prob, whatever steps of different samples meet in a batch."""
    module, args, transformer, vae, cache, schedule = policy
    cond = module.load_cond(cache, list(range(8)), transformer, vae, args)
    z_1 = initial_noise(module, transformer, vae, args, 8)
    noise = [keyed_generator(0, "noise", i) for i in range(8)]
    stochastic = args.sampling_steps - 1
    trained_steps = module.select_timesteps([keyed_generator(0, "steps", i) for i in range(8)], stochastic, 0.6)
    parts = []
    for batch in torch.arange(8).split(rollout_batch_size):
        batch_cond = {name: tensor[batch] for name, tensor in cond.items()}
        levels, generators = [args.noise_level] * stochastic + [0.0], [noise[i] for i in batch]
        parts.append(module.rollout(transformer, batch_cond, z_1[batch], schedule, levels, generators, trained_steps[batch])[0])
    trajectory = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    samples, slots = torch.arange(8).repeat(trained_steps.shape[1]), torch.arange(trained_steps.shape[1]).repeat_interleave(8)
    deviations = []
    for sample, slot in zip(samples.split(micro_batch_size), slots.split(micro_batch_size)):
        transitions, pair_cond = module.pick(trajectory, cond, sample, slot, 1)
        log_prob, _ = module.score_transitions(transformer, transitions, pair_cond, schedule)
        assert log_prob.requires_grad
        deviations.append((log_prob - transitions["old_log_prob"]).exp().sub(1).abs().max().item())
    assert max(deviations) < 1e-6


@pytest.mark.parametrize("rollout_batch_size", [1, 3])
def test_steps_before_the_window_are_made_once_for_samples_of_the_same_noise(policy, family, monkeypatch, rollout_batch_size):
    """Each sample's trajectory is the one that it has alone: bit for bit if all batches have one row, as then it alone has."""
    module, args, transformer, vae, cache, schedule = policy
    args = replace(args, sde_window=(2, 2), num_generations=2, updates_per_iteration=1)
    cond, shape = module.load_cond(cache, [0, 1], transformer, vae, args), module.latent_shape(transformer, vae, args)
    samples, trained_steps = [(place, g) for place in (5, 3) for g in range(2)], torch.tensor([[2, 3]] * 4)

    def generators(purpose: str, keys: list) -> list[torch.Generator]:
        return [keyed_generator(0, purpose, *key) for key in keys]

    made, predict = [], module.predict
    monkeypatch.setattr(module, "predict", lambda *given: made.append(len(given[1])) or predict(*given))
    run = SimpleNamespace(args=args, policy=transformer, device=torch.device("cpu"), sampling=nullcontext, generators=generators)
    run.batches = lambda count: torch.arange(count).split(rollout_batch_size)
    found = module.sample_groups(samples, cond, trained_steps, schedule, shape, run)
    assert sum(made) == 2 * 2 + (args.sampling_steps - 2) * 4
    for i, sample in enumerate(samples):
        own = (
            {name: tensor[[i // 2]] for name, tensor in cond.items()},
            torch.randn(1, *shape, generator=generators("initial_noise", [sample[:1]])[0]),
        )
        noise = generators("step_noise", [sample])
        kept, x0_hat = module.rollout(transformer, *own, schedule, module.noise_levels(schedule, args), noise, trained_steps[[i]])
        for name, expected in (kept | {"x0_hat": x0_hat}).items():
            tolerance = {"atol": 0, "rtol": 0} if rollout_batch_size == 1 else {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(found[name][[i]], expected, **tolerance)


def assert_noise_0_is_the_pipeline(policy, family, transformer, monkeypatch) -> None:
    """The same latents and media as the whole pipeline, text encoders and all, gives with `transformer` and evaluate.py's settings."""
    module, args, _, vae, cache, schedule = policy
    rows = cache.rows[:3]
    z_1 = initial_noise(module, transformer, vae, args, 3)
    cond = module.load_cond(cache, [0, 1, 2], transformer, vae, args)
    nothing_trained = torch.empty(3, 0, dtype=torch.long)
    _, latents = module.rollout(transformer, cond, z_1, schedule, [0.0] * args.sampling_steps, [], nothing_trained)
    with torch.no_grad():
        media = module.decode(vae, latents, args)

    pipeline = DiffusionPipeline.from_pretrained(family.model, dtype=torch.float32)
    setattr(pipeline, family.network, transformer)  # given to from_pretrained, Wan's would be ignored
    pipeline.set_progress_bar_config(disable=True)
    sampling = {name: (vars(args) | cache.fingerprint)[name] for name in family.facts.sampling}
    use_trained_sampler(pipeline, sampling)
    # SkyReels' pipeline draws the image's latents from the VAE's posterior; the cache has its mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    arguments = pipeline_arguments(pipeline, sampling, rows) | {"latents": z_1}
    expected = media_of(pipeline(**arguments), sampling)
    final = pipeline(**arguments | {"output_type": "latent"})
    torch.testing.assert_close(latents, final.images if "images" in final else final.frames, atol=1e-4, rtol=0)
    assert media.shape == expected.shape
    torch.testing.assert_close(media, expected, atol=1e-4, rtol=0)
    assert media.std() > 0.05  # a picture, not a constant


def test_noise_0_is_diffusers_pipeline(policy, family, monkeypatch):
    assert_noise_0_is_the_pipeline(policy, family, policy[2], monkeypatch)


def test_what_stands_in_padded_text_changes_nothing(policy, family):
    module, args, transformer, vae, cache, schedule = policy
    cond = module.load_cond(cache, [0, 1], transformer, vae, args)
    masks = [name for name in cond if name.endswith("attention_mask")]
    if not masks:
        pytest.skip("the text has no mask")
    z_t, step = initial_noise(module, transformer, vae, args, 2), torch.tensor([1, 3])
    spoilt = dict(cond)
    for name in masks:
        embeds, padded = name.replace("attention_mask", "embeds"), cond[name] == 0
        assert padded.any() and not padded.all()
        spoilt[embeds] = torch.where(padded[..., None], 100 * torch.randn_like(cond[embeds]), cond[embeds])
        assert not torch.equal(spoilt[embeds], cond[embeds])
    with torch.no_grad():
        expected, found = (module.predict(transformer, z_t, schedule[step], c) for c in (cond, spoilt))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_attention_has_no_masks(policy, family, monkeypatch):
    """Flash kernels know none. Each call of a forward and a backward pass is counted, at the launch script's batch sizes and with 8 texts.

    HunyuanVideo's token refiner alone, which sees no more than the text, has masks; everywhere else a text is as long as it is.
    """
    module, args, transformer, vae, cache, schedule = policy
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, attn_mask=None, **others):
        calls.append((key.shape[2], len(key), attn_mask is not None))
        return attention(query, key, value, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    launch = (REPOSITORY / "scripts" / f"train_{family.name}.sh").read_text()
    sizes = {int(size) for size in re.findall(r"--(?:rollout|micro)_batch_size (\d+)", launch)}
    transformer.enable_gradient_checkpointing()
    for size in sizes | {8}:
        calls.clear()
        cond, steps = module.load_cond(cache, list(range(size)), transformer, vae, args), torch.arange(size) % 4
        z_t = initial_noise(module, transformer, vae, args, size)
        when = (steps, schedule) if family.name == "sd" else (schedule[steps],)
        module.predict(transformer, z_t, *when, cond).square().sum().backward()
        masks = [tensor for name, tensor in cond.items() if name.endswith("attention_mask")]
        lengths = torch.cat(masks).sum(1).int().tolist() if masks else []
        masked, rows = [tokens for tokens, _, mask in calls if mask], Counter()
        for tokens, count, mask in calls:
            rows[tokens] += count * (not mask)
        assert masked == [max(lengths)] * transformer.config.num_refiner_layers if masks else masked == []
        if masks:
            image = z_t[0, 0].numel() // transformer.config.patch_size**2
            blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
            assert +rows == Counter({image + length: 2 * blocks * count for length, count in Counter(lengths).items()})
    assert sizes and rows.total()
    transformer.disable_gradient_checkpointing()
    transformer.zero_grad()


def test_gradients_flow_through_both_branches_of_guidance(policy, family):
    """They are those of the guided prediction put together from two calls without guidance."""
    module, args, network, vae, cache, schedule = policy
    cond = module.load_cond(cache, [0, 1], network, vae, args)
    if "guidance_scale" not in cond:
        pytest.skip("has no classifier-free guidance")
    plain = {name: tensor for name, tensor in cond.items() if not name.startswith("negative_") and name != "guidance_scale"}
    empty = plain | {name.removeprefix("negative_"): tensor for name, tensor in cond.items() if name.startswith("negative_")}
    z_t, step = initial_noise(module, network, vae, args, 2), torch.tensor([1, 3])
    when = (step, schedule) if family.name == "sd" else (schedule[step],)
    direction = torch.randn(z_t.shape, generator=keyed_generator(0, "direction"))
    weights = [weight for weight in network.parameters() if weight.requires_grad]

    def gradients(prediction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((prediction * direction).sum(), weights, allow_unused=True)

    guided, negative, positive = (gradients(module.predict(network, z_t, *when, c)) for c in (cond, empty, plain))
    assert args.guidance_scale == 2
    for found, empty_part, prompt_part in zip(guided, negative, positive, strict=True):
        if found is not None:
            torch.testing.assert_close(found, 2 * prompt_part - empty_part, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def run(family, cache, tmp_path_factory) -> Path:
    """A run of two iterations, the second one of which samples clips."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"--model": family.model, "--embeddings": cache, "--output_dir": folder / "run"} | SMALL_RUN
    flags |= {"--rewards": family.rewards, "--iterations": 2, "--updates_per_iteration": 1, "--sample_every": 2} | family.flags
    result = run_script(family.script, flags, log=folder / "log")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_training_moves_the_weights(run, family):
    rows = metrics_of(run)
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/ratio_max_dev"] < 2e-6
        assert row["policy/grad_norm"] > 0
        assert all(f"reward/{reward}_mean" in row for reward in family.rewards)
    exported = weights_of(run / "export" / family.network)
    assert largest_difference(exported, weights_of(family.model / family.network)) > 1e-5
    assert (run / "samples" / "iteration_000002.png").is_file()
    assert len(list((run / "samples").glob("*.mp4"))) == (8 if family.clips else 0)


@pytest.mark.slow
def test_layouts_make_the_same_training(family, cache, tmp_path):
    """One process, two with half the prompts each, two that share each sample, and four that do both: the same up to rounding."""
    layouts = {"one": (1, 1), "dp_2": (2, 1)} | ({} if family.facts.parallelize is None else {"sp_2": (2, 2), "dp_2_sp_2": (4, 2)})
    smooth = "visual" if family.clips and family.trained else "aesthetic"
    rows = {}
    for layout, (processes, sp_size) in layouts.items():
        flags = {"--model": family.model, "--embeddings": cache, "--output_dir": tmp_path / layout} | SMALL_RUN | family.flags
        flags |= {"--rewards": smooth, "--iterations": 5} | ({"--sp_size": sp_size} if sp_size > 1 else {})
        result = run_script(family.script, flags, processes=processes, log=tmp_path / f"{layout}.log")
        assert result.returncode == 0, result.stderr
        rows[layout] = metrics_of(tmp_path / layout)
    for layout in layouts:
        assert len(rows[layout]) == 5
        for row, expected in zip(rows[layout], rows["one"]):
            for key in (f"reward/{smooth}_mean", "policy/grad_norm"):
                tolerance = 1e-5 if row["iteration"] == 1 else 1e-3
                assert row[key] == pytest.approx(expected[key], rel=tolerance), (layout, row["iteration"], key)


def test_the_export_in_diffusers_pipeline_is_our_sampler(policy, run, family, monkeypatch):
    exported = type(policy[2]).from_pretrained(run / "export", subfolder=family.network)
    assert_noise_0_is_the_pipeline(policy, family, exported, monkeypatch)


def test_the_export_is_evaluated_with_the_runs_settings(run, family, cache, tmp_path):
    flags = {
        "--model": family.model,
        "--checkpoints": f"trained={run}/export",
        "--prompts": cache.parent / "prompts.jsonl",
        "--num_seeds": 1,
    }
    flags |= {"--rewards": family.rewards, "--output_dir": tmp_path / "evaluation"}
    result = run_script(EVALUATE, flags, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["sampling"] == json.loads((run / "manifest.json").read_text())["sampling"]
    base, trained = (results["scores"][model]["prompts"] for model in ("base", "trained"))
    assert base.keys() == trained.keys() == set(family.rewards)
    assert any(base[name] != trained[name] for name in family.rewards)
    assert (tmp_path / "evaluation" / "samples.png").is_file()


def test_a_folder_of_the_other_kind_is_refused(family, cache, tmp_path):
    """Their encoders may be the same, so that nothing else would notice."""
    same = [name for name, facts in FAMILIES.items() if facts.network.class_name == family.facts.network.class_name and name != family.name]
    if not same:
        pytest.skip("has no sibling of the same classes")
    flags = {"--model": tiny_model(same[0]), "--embeddings": cache, "--output_dir": tmp_path / "run"}
    flags |= {"--rewards": tuple(family.rewards), "--height": 32, "--width": 32, "--prompts_per_iteration": 1}
    result = run_script(family.script, flags, log=tmp_path / "log")
    assert result.returncode == 2
    assert f"see train_grpo_{same[0]}.py" in result.stderr


def test_a_checkpoint_of_another_family_is_refused(run, family, cache, tmp_path):
    flags = {"--model": REPOSITORY / "shapes" / "models" / "flux", "--checkpoints": run / "export", "--rewards": "aesthetic"}
    flags |= {"--prompts": PROMPTS / "train.txt", "--output_dir": tmp_path / "evaluation"}
    result = run_script(EVALUATE, flags, log=tmp_path / "log")
    assert result.returncode == 2
    assert "is not of a FluxPipeline" in result.stderr
