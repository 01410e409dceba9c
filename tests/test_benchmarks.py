"""The benchmarks run, and what they count agrees with theory. Their times are for people."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, launch, run_script
from torch.utils.checkpoint import checkpoint

from benchmarks import memory
from benchmarks.common import MODELS
from benchmarks.fake import FakeCache, make_schedule
from fastvideo.rewards.open_clip import clip_config

SEQUENCE_PARALLEL = REPOSITORY / "benchmarks" / "sequence_parallel.py"
ZERO = REPOSITORY / "benchmarks" / "zero.py"
MEMORY = REPOSITORY / "benchmarks" / "memory.py"
STARTUP = REPOSITORY / "benchmarks" / "startup.py"


def report_of(script, *flags, processes, log) -> dict:
    result = run_script(script, *flags, processes=processes, log=log, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def results_of(*arguments, **options) -> list[dict]:
    return report_of(*arguments, **options)["results"]


@pytest.mark.parametrize("tokens, heads", [(512, 8), pytest.param(515, 7, marks=pytest.mark.slow)], ids=["divisible", "indivisible"])
def test_sequence_parallelism_sends_what_theory_says_and_divides_the_activations(tmp_path, tokens, heads):
    sizes = {"--tokens": tokens, "--text_tokens": 32, "--heads": heads, "--layers": 2, "--repeats": 1}
    results = results_of(SEQUENCE_PARALLEL, {"--model": MODELS}, sizes, processes=4, log=tmp_path / "log")
    rows = {(row["model"], row["sp_size"]): row for row in results}
    assert rows.keys() == {(model, sp_size) for model in MODELS for sp_size in (1, 2, 4)}
    for (model, sp_size), row in rows.items():
        text = 0 if model == "wan" else 32
        formula = 4 * heads * 32 * (sp_size - 1) / sp_size * (4 * tokens / sp_size + text)  # float32
        for direction in ("forward", "backward"):
            sent = row[f"{direction}_bytes_per_layer"]
            assert sent == row["exact_bytes_per_layer"], (model, sp_size)
            assert sent == pytest.approx(formula, rel=0.01), (model, sp_size)
        share = row["activation_bytes"] / rows[model, 1]["activation_bytes"]
        assert share <= {1: 1, 2: 0.6, 4: 0.35}[sp_size], (model, sp_size)  # the text, one in 17 tokens, is not divided


def test_sequence_parallelism_benchmark_in_bfloat16_sends_half(tmp_path):
    sizes = {"--tokens": 64, "--text_tokens": 16, "--layers": 2, "--repeats": 1, "--sp_size": 2, "--dtype": "bfloat16"}
    for row in results_of(SEQUENCE_PARALLEL, {"--model": MODELS}, sizes, processes=2, log=tmp_path / "log"):
        if row["sp_size"] == 2:
            elements = 8 * 32 / 2 * (2 * 64 + (0 if row["model"] == "wan" else 16))
            assert row["forward_bytes_per_layer"] == row["backward_bytes_per_layer"] == 2 * elements


@pytest.mark.parametrize(
    "dtype, stages", [("float32", (0, 1, 2, 3)), pytest.param("bfloat16", (1, 2, 3), marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_zero_holds_what_theory_says(tmp_path, dtype, stages):
    results = results_of(ZERO, {"--dtype": dtype}, processes=2, log=tmp_path / "log")
    assert [row["stage"] for row in results] == list(stages)
    for row in results:
        stage, number = row["stage"], row["num_parameters"]
        itemsize = 4 if dtype == "float32" else 2
        theory = {
            "parameters": itemsize * number / (2 if stage == 3 else 1),
            "gradients": 4 * number / (2 if stage >= 2 else 1),
            "optimizer": 8 * number if stage == 0 else 12 * number / 2,
        }
        more = dict.fromkeys(theory, 0)
        if stage == 2:  # the gradient that two shards divide is whole
            more["gradients"] = 4 * row["largest_parameter"]
        if stage == 1 and dtype == "bfloat16":  # the last micro-batch's, beside the sum
            more["gradients"] = 2 * number
        for kind, expected in theory.items():
            assert row[f"{kind}_theory_bytes"] == expected
            assert 0.999 * expected <= row[f"{kind}_bytes"] <= 1.05 * expected + more[kind], (stage, kind)


def test_the_network_is_read_once_and_held_once(tmp_path):
    flags = {"--processes": 2, "--heads": 8, "--layers": 6, "--directory": tmp_path}
    report = report_of(STARTUP, flags, processes=2, log=tmp_path / "log")
    size = report["network_bytes"]
    assert size > 150e6
    rows = {(row["way"], row["rank"]): row for row in report["results"]}
    assert rows.keys() == {(way, rank) for way in ("before", "after") for rank in (0, 1)}
    for reader in (rows["before", 0], rows["before", 1], rows["after", 0]):
        assert size < reader["read_bytes"] + reader["mapped_bytes"] < size + 50e6, "once, beside the libraries that a forked process maps"
        assert reader["peak_bytes"] > size
    assert rows["after", 0]["peak_bytes"] < 1.4 * size, "the network, and one of its four files once more"
    other = rows["after", 1]
    assert other["read_bytes"] + other["mapped_bytes"] < 0.02 * size
    assert other["peak_bytes"] < 0.1 * size
    assert list(tmp_path.glob("*/transformer")) == [], "its files stayed"


def allocated(function: Callable, *arguments) -> tuple[int, int, Any]:
    """Bytes of real memory, by the allocator's own events: the most at once, what is left afterwards; and the result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function(*arguments)
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sums = list(itertools.accumulate(events, initial=0))
    return max(sums), sums[-1], result


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("family", ["flux", *(pytest.param(family, marks=pytest.mark.slow) for family in ("hunyuan", "wan", "sd"))])
def test_memory_counts_what_real_tensors_take(family, checkpointing):
    """The tiny networks on a CPU. Beyond what is counted, kernels of the backward pass have memory of their own while they run."""
    published, facts = next((model, model.family) for model in memory.MODELS.values() if model.script == f"train_grpo_{family}")
    parts = facts.network.tiny, facts.vae.tiny
    cached = {name: shape if name.endswith("mask") else (*shape[:-1], 64) for name, shape in published.cached.items()}
    model = replace(published, network=(published.network[0], parts[0]), vae=(published.vae[0], parts[1]), cached=cached)
    flags = ["--height", "128", "--width", "128", "--rollout_batch_size", "3", "--micro_batch_size", "2"]
    flags += ["--num_frames", "9"] if "num_frames" in facts.sampling else []
    module, args, _ = memory.launch_settings(model, [*flags, f"--{'' if checkpointing else 'no-'}gradient_checkpointing"])
    found = memory.measure(module, model, args, 1)

    network, vae = (kind(**config).bfloat16() for kind, config in (model.network, model.vae))
    vae.use_tiling = vae.use_slicing = getattr(args, "vae_tiling", False)
    assert sum(parameter.nbytes for parameter in network.parameters()) == found["network"]
    network.train()
    if checkpointing:  # without the states of the random generators, which are in host memory
        network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    for weight in network.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    cond = module.load_cond(FakeCache(model.cached, 128, 128), [0], network, vae, args)
    batch_cond = {name: tensor[[0, 0, 0]] for name, tensor in cond.items()}
    schedule, shape = make_schedule(module, args, 2), module.latent_shape(network, vae, args)
    steps = torch.zeros(3, math.ceil(0.6 * (args.sampling_steps - 1)), dtype=torch.long)
    given = torch.randn(3, *shape), schedule, [args.noise_level, 0.0], [torch.Generator()] * 3, steps

    most, _, (trajectory, x0_hat) = allocated(module.rollout, network, batch_cond, *given)
    assert found["sampling"] == pytest.approx(most, rel=0.001)
    assert found["kept"] * 3 == sum(tensor.nbytes for tensor in (*trajectory.values(), x0_hat))
    most, _, _ = allocated(torch.no_grad()(module.decode), vae, x0_hat, args)
    assert 0.5 * most < found["decoding"] <= most
    first = torch.zeros(2, dtype=torch.long)
    transitions, pair_cond = module.pick(trajectory, cond, first, first, args.kept_generations)
    _, saved, (log_prob, u_hat) = allocated(module.score_transitions, network, transitions, pair_cond, schedule)
    assert found["saved"] == pytest.approx(saved, rel=0.001)
    del log_prob, u_hat

    def update() -> None:
        transitions, pair_cond = module.pick(trajectory, cond, first, first, args.kept_generations)
        log_prob, _ = module.score_transitions(network, transitions, pair_cond, schedule)
        module.grpo_loss(log_prob, transitions["old_log_prob"], torch.ones(2), args.clip_range)[0].backward()

    most, _, _ = allocated(update)
    assert (0.75 if checkpointing else 0.9) * most < found["update"] <= most


def test_memory_of_zero_by_its_formulas():
    """FLUX's launch script, 32 GPUs, stage 2, against sums by hand."""
    found = {"network": 2_000, "trained": 2_000, "vae": 7, "sampling": 11, "decoding": 13, "update": 17, "saved": 5, "cond": 3, "kept": 2}
    _, args, gpus = memory.launch_settings(memory.MODELS["flux.1-dev"], ["--best_of_n", "8"])
    assert gpus == 32
    rewards = sum(memory.REWARDS[name] for name in ("hpsv2", "clip"))
    held = rewards + 7 + 3
    two, three = (memory.row(found, args, 32, stage, 1) for stage in (2, 3))
    assert two["update"] == held + 2_000 + (4 + 2 + 12 + 4) * 1_000 / 32 + 800_000_000 + 8 * 2 + 17
    assert two["sampling"] == held + 2_000 + 22 * 1_000 / 32 + 12 * 2 + 11
    assert two["start"] == rewards + 7 + 4_000
    assert three["update"] == held + (2 + 20) * 1_000 / 32 + 400_000_000 + 2_000_000_000 + 8 * 2 + 17
    assert three["sampling"] == held + 22 * 1_000 / 32 + 400_000_000 + 2_000 + 12 * 2 + 11
    assert three["start"] == rewards + 7 + 2_000
    assert memory.row(found, args, 8, 1, 1)["gradients"] == 6_000


def test_memory_of_the_rewards_networks():
    from transformers import CLIPModel, Qwen2VLConfig, Qwen2VLModel

    towers = {
        "vision_cfg": {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"layers": 24, "width": 1024, "heads": 16},
    }
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    with torch.device("meta"):
        for name, pixels in (("hpsv2", 224), ("clip", 378)):
            model = CLIPModel(clip_config({"embed_dim": 1024, **towers, "vision_cfg": towers["vision_cfg"] | {"image_size": pixels}}))
            assert memory.REWARDS[name] == 4 * sum(weight.numel() for weight in model.parameters())
        model = Qwen2VLModel(Qwen2VLConfig(text_config=text | {"vocab_size": 151660}, vision_config={"hidden_size": 1536}))
        assert memory.REWARDS["videoalign"] == 2 * (sum(weight.numel() for weight in model.parameters()) + 1536)  # and its head


@pytest.mark.slow
def test_started_alone_a_benchmark_starts_its_processes():
    result = launch(SEQUENCE_PARALLEL, {"--model": "wan", "--sp_size": 2, "--tokens": 64, "--repeats": 1})
    assert result.returncode == 0, result.stderr
    assert [row["sp_size"] for row in json.loads(result.stdout.splitlines()[-1])["results"]] == [1, 2]


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_in_one_sentence():
    for script, flags, message in [
        (SEQUENCE_PARALLEL, {"--sp_size": 9}, "error: --sp_size must be from 2 to --heads, 8, not 9\n"),
        (STARTUP, {"--files": 0}, "error: --files must be at least 1, not 0\n"),
        (
            MEMORY,
            {"--model": "sd_v1.4", "--gpus": 7},
            "error: --prompts_per_iteration 32 does not divide among 7 GPUs in groups of 1\n",
        ),
        (MEMORY, {"--offload": ()}, "error: --offload, --kl_weight and --dtype float32 are not computed here\n"),
        (ZERO, {"--head_dim": 12}, "error: --head_dim must be a multiple of 8, for the three axes of rotary embeddings, not 12\n"),
    ]:
        result = launch(script, flags)
        assert (result.returncode, result.stderr) == (2, message)
