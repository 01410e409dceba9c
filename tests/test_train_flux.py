"""train_grpo_flux.py end to end: the same training on any layout, a ratio of 1, every option, and an export that diffusers loads."""

import pytest
import torch
from conftest import MODEL, TRAIN, largest_difference, launch, metrics_of, weights_of
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import train_grpo_flux
from fastvideo.embeddings.cache import EmbeddingCache
from fastvideo.parallel.distributed import Ranks, keyed_generator

# ------------------------------------------------------------------------------------------- the ratio before the first update


@pytest.fixture(scope="module")
def policy(cache):
    """The script's own models, prompts and settings, without an engine around them."""
    args = train_grpo_flux.Args(
        model=MODEL, embeddings=cache, output_dir=MODEL, rewards=("aesthetic",), sampling_steps=6, height=32, width=32, noise_level=0.7
    )
    transformer, vae = train_grpo_flux.load_models(args, torch.float32, Ranks(0, 1, torch.device("cpu")))
    return args, transformer, vae, EmbeddingCache(cache)


@pytest.mark.parametrize("rollout_batch_size", [1, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_ratio_is_1_before_the_first_update(policy, rollout_batch_size, micro_batch_size):
    """Rollout and update batches of any size give one log-prob, whatever steps of different samples meet in a batch."""
    args, transformer, vae, cache = policy
    samples = 8
    cond = train_grpo_flux.load_cond(cache, list(range(samples)), transformer, vae, args)
    z_1 = torch.stack([torch.randn(64 // 4, 16, generator=keyed_generator(0, "z_1", i)) for i in range(samples)])
    noise = [keyed_generator(0, "noise", i) for i in range(samples)]
    trained_steps = train_grpo_flux.select_timesteps([keyed_generator(0, "steps", i) for i in range(samples)], 5, 0.6)
    schedule = train_grpo_flux.time_schedule(args.sampling_steps, args.shift)
    levels = [args.noise_level] * 5 + [0.0]

    parts = []
    for batch in torch.arange(samples).split(rollout_batch_size):
        batch_cond = {name: tensor[batch] for name, tensor in cond.items()}
        part, _ = train_grpo_flux.rollout(
            transformer, batch_cond, z_1[batch], schedule, levels, [noise[i] for i in batch], trained_steps[batch]
        )
        parts.append(part)
    trajectory = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    sample, slot = torch.arange(samples).repeat(3), torch.arange(3).repeat_interleave(samples)
    deviations = []
    for i, k in zip(sample.split(micro_batch_size), slot.split(micro_batch_size)):
        transitions = {name: tensor[i, k] for name, tensor in trajectory.items()}
        sample_cond = {name: tensor[i] for name, tensor in cond.items()}
        log_prob, _ = train_grpo_flux.score_transitions(transformer, transitions, sample_cond, schedule)
        assert log_prob.requires_grad
        deviations.append((log_prob - transitions["old_log_prob"]).exp().sub(1).abs().max().item())
    assert max(deviations) < 1e-6


def test_ratio_is_1_before_each_iterations_first_update(finished_run):
    rows = metrics_of(finished_run)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["policy/ratio_max_dev"] < 1e-6 for row in rows)
    assert any(row["policy/approx_kl"] > 0 for row in rows)  # and not 1 any more at the second update


OTHER_RATIO = """
import os
import train_grpo_flux
from fastvideo.parallel import distributed

rollout = train_grpo_flux.rollout

def off_on_rank_1(*arguments):
    kept, x0_hat = rollout(*arguments)
    kept["old_log_prob"] += 1e-3 * (os.environ["RANK"] == "1")
    return kept, x0_hat

train_grpo_flux.rollout = off_on_rank_1
distributed.run(train_grpo_flux.main)
"""


def test_a_ratio_that_is_not_1_on_one_process_stops_all(train, tmp_path):
    script = tmp_path / "other_ratio.py"
    script.write_text(OTHER_RATIO)
    result = train(tmp_path / "run", script=script, processes=2, check=False)
    assert result.returncode == 2
    assert result.stderr.count("error: before the first update, max |ratio - 1| is 1.0e-03 with --clip_range 0.0001") == 1


# ---------------------------------------------------------------------------------------------------- one training, many layouts

FOUR_PROMPTS = {"--iterations": 5, "--prompts_per_iteration": 4, "--timestep_fraction": 0.6, "--noise_level": 0.7}

# ZeRO keeps tensors below 100,000 elements whole on every process, which here are nearly all: this driver makes it shard each of them.
SHARD_EVERYTHING = """
import deepspeed
import train_grpo_flux
from fastvideo.parallel import distributed

initialize = deepspeed.initialize

def initialize_with_thresholds_of_0(config, **arguments):
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    return initialize(config=config, **arguments)

deepspeed.initialize = initialize_with_thresholds_of_0
distributed.run(train_grpo_flux.main)
"""


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    run = tmp_path_factory.mktemp("parity") / "one_process"
    train(run, FOUR_PROMPTS, {"--zero_stage": 0})
    return run


def assert_same_training(run, reference):
    """The same up to rounding, which grows with the iterations."""
    rows, reference_rows = metrics_of(run), metrics_of(reference)
    assert len(rows) == len(reference_rows) == 5
    for row, expected in zip(rows, reference_rows):
        tolerance = 1e-5 if row["iteration"] == 1 else 1e-3
        for key in ("reward/aesthetic_mean", "policy/grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=tolerance), (row["iteration"], key)
    exported, initial = weights_of(run / "export" / "transformer"), weights_of(MODEL / "transformer")
    assert largest_difference(exported, initial) > 5e-4  # it did move
    assert largest_difference(exported, weights_of(reference / "export" / "transformer")) < 1e-4


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, {"--zero_stage": 2, "--rollout_batch_size": 7, "--micro_batch_size": 5}),
        (1, {"--zero_stage": 3, "--rollout_batch_size": 16, "--micro_batch_size": 24}),
        pytest.param(2, {"--zero_stage": 1, "--sample_every": 2}, marks=pytest.mark.slow),
        (2, {"--zero_stage": 2, "--rollout_batch_size": 3, "--micro_batch_size": 7}),
        (2, {"--sp_size": 2, "--zero_stage": 2, "--sample_every": 2}),
        (4, {"--sp_size": 2, "--zero_stage": 2, "--rollout_batch_size": 3}),
        pytest.param(4, {"--sp_size": 2, "--zero_stage": 3, "--sample_every": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"--zero_stage": 3, "--sample_every": 2, "--micro_batch_size": 12}, marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value}_processes" if isinstance(value, int) else "-".join(str(v) for v in value.values()),
)
def test_layouts_make_the_same_training(train, one_process, tmp_path, processes, flags):
    train(tmp_path / "run", FOUR_PROMPTS, flags, processes=processes)
    assert_same_training(tmp_path / "run", one_process)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"--no-gather_for_rollout": ()}, {"--sp_size": 2}], ids=["gathered", "by_layer", "sp"])
def test_stage_3_with_every_tensor_sharded(train, one_process, tmp_path, flags):
    script = tmp_path / "shard_everything.py"
    script.write_text(SHARD_EVERYTHING)
    train(tmp_path / "run", FOUR_PROMPTS, {"--zero_stage": 3, "--sample_every": 2} | flags, processes=2, script=script)
    assert_same_training(tmp_path / "run", one_process)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 3


COUNT_DECODED = """
import os
import train_grpo_flux
from fastvideo.parallel import distributed

decode = train_grpo_flux.decode

def counting_decode(vae, x0_hat, args):
    with open(f"{args.output_dir}.decoded.{os.environ['RANK']}", "a") as file:
        print(len(x0_hat), file=file)
    return decode(vae, x0_hat, args)

train_grpo_flux.decode = counting_decode
distributed.run(train_grpo_flux.main)
"""


def test_no_process_decodes_what_another_does(train, tmp_path):
    """4 prompts of 4 samples, and 8 pictures, on two pairs of processes: each decodes 1 for the preflight, 4 samples, 2 pictures."""
    script, run = tmp_path / "count.py", tmp_path / "run"
    script.write_text(COUNT_DECODED)
    train(run, FOUR_PROMPTS, {"--iterations": 1, "--sample_every": 1, "--sp_size": 2}, processes=4, script=script)
    for rank in range(4):
        counts = [int(line) for line in run.with_name(f"run.decoded.{rank}").read_text().splitlines()]
        assert sum(counts) == 1 + 4 + 2


@pytest.mark.slow
def test_command_line_and_torchrun(run_flags, one_process, tmp_path):
    """What the other tests fork, launched as a user does: the same numbers."""
    for processes, stage in ((1, 0), (2, 2)):
        run = tmp_path / str(processes)
        result = launch(TRAIN, *run_flags(run, FOUR_PROMPTS, {"--zero_stage": stage}), processes=processes)
        assert result.returncode == 0, result.stderr
        assert_same_training(run, one_process)
    assert metrics_of(tmp_path / "1") == metrics_of(one_process)


# --------------------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def test_export_samples_in_diffusers_as_in_the_script(policy, finished_run):
    """FluxPipeline loads the export, and its Euler sampler gives the latents and pictures of our rollout without noise."""
    args, _, vae, cache = policy
    transformer = FluxTransformer2DModel.from_pretrained(finished_run / "export", subfolder="transformer")
    pipeline = FluxPipeline.from_pretrained(MODEL, transformer=transformer)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift, use_dynamic_shifting=False)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [row["prompt"] for row in cache.rows[:3]]
    z_1 = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": args.embedded_guidance}
    latents, pictures = (pipeline(prompts, latents=z_1, output_type=kind, **settings).images for kind in ("latent", "pt"))

    cond = train_grpo_flux.load_cond(cache, [0, 1, 2], transformer, vae, args)
    schedule = train_grpo_flux.time_schedule(6, args.shift)
    _, x0_hat = train_grpo_flux.rollout(transformer, cond, z_1, schedule, [0.0] * 6, [], torch.empty(3, 0, dtype=torch.long))
    assert (x0_hat - latents).abs().max() < 1e-5
    assert (train_grpo_flux.decode(vae, x0_hat, args) - (pictures * 2 - 1)).abs().max() < 1e-5


def test_ema_is_the_average_of_the_weights(train, tmp_path):
    """After one update, a decay of 0.5 exports the midpoint between the initial and the last weights, which a decay of 0 exports."""
    exported = {}
    for decay in (0, 0.5):
        train(tmp_path / str(decay), {"--iterations": 1, "--updates_per_iteration": 1, "--ema_decay": decay})
        exported[decay] = weights_of(tmp_path / str(decay) / "export" / "transformer")
    initial = weights_of(MODEL / "transformer")
    assert largest_difference(exported[0], initial) > 5e-5
    assert largest_difference(exported[0.5], {name: (initial[name] + exported[0][name]) / 2 for name in initial}) < 1e-7


# -------------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "flags",
    [
        {"--best_of_n": 4, "--num_generations": 6},
        {"--old_log_prob": "recompute", "--timestep_selection": "first"},
        {"--timestep_selection": "last", "--advantage_clip": 0.5, "--max_grad_norm": 0},
        {"--sde_window": (0, 3), "--gradient_checkpointing": ()},
        {"--noise_schedule": "decay", "--kl_weight": 0.01},
        {"--noise_schedule": "flow_grpo", "--sde_window": (0, 3)},
        {"--lr_warmup_steps": 4, "--ema_decay": 0},
        {"--trackers": "tensorboard", "--sample_every": 1, "--keep_checkpoints": 1, "--checkpoint_every": 1},
        {"--rewards": ("aesthetic@0.6", "shapes"), "--reward_weights": (1.4, 0.7)},
    ],
    ids=lambda flags: "".join(flags),
)
def test_option(train, finished_run, tmp_path, flags):
    """Each runs, keeps the ratio at 1, and changes what it says it changes."""
    run = tmp_path / "run"
    train(run, flags)
    rows = metrics_of(run)
    before = metrics_of(finished_run)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(row["policy/ratio_max_dev"] < 1e-6 for row in rows)
    if "--best_of_n" in flags:
        assert [row["samples"] for row in rows] == [12, 24, 36]
    if "--old_log_prob" in flags:
        assert rows[0]["policy/ratio_max_dev"] == 0
        assert rows[0]["policy/grad_norm"] != before[0]["policy/grad_norm"]  # other steps are trained
    if "--advantage_clip" in flags:
        assert rows[0]["advantage/abs_mean"] <= 0.5 < before[0]["advantage/abs_mean"]
    if "--noise_schedule" in flags:
        assert rows[0]["reward/aesthetic_group_std"] != before[0]["reward/aesthetic_group_std"]
    if "--sde_window" in flags:
        assert rows[0]["reward/aesthetic_group_std"] != before[0]["reward/aesthetic_group_std"]  # one noisy step less
    if "--lr_warmup_steps" in flags:
        assert [row["policy/lr"] for row in rows] == pytest.approx([7.5e-5, 1e-4, 1e-4])  # of the coming update
    if "--trackers" in flags:
        assert list((run / "tensorboard").glob("events.*"))
        assert len(list((run / "samples").glob("*.png"))) == 3
        assert [path.name for path in (run / "checkpoints").glob("iteration_*")] == ["iteration_000003"]
    if "--reward_weights" in flags:
        binary_mean = rows[0]["reward/aesthetic_mean"]
        assert binary_mean * 8 == round(binary_mean * 8)
        assert "reward/shapes_mean" in rows[0]


def test_shared_noise(train, tmp_path):
    """With hardly any noise on the way, samples of one prompt are alike if they start alike."""
    options, spread = {"--noise_level": 1e-3, "--iterations": 1}, {}
    for flag in ("--shared_noise", "--no_shared_noise"):
        train(tmp_path / flag, options, flag)
        spread[flag] = metrics_of(tmp_path / flag)[0]["reward/aesthetic_group_std"]
    assert 0 < spread["--shared_noise"] < spread["--no_shared_noise"] / 10


def test_gradient_checkpointing_changes_no_number(train, finished_run, tmp_path):
    train(tmp_path / "run", {"--gradient_checkpointing": ()})
    assert metrics_of(tmp_path / "run") == metrics_of(finished_run)[:3]


@pytest.mark.parametrize("flags", [{"--learning_rate": 1e-3}, {"--learning_rate": 1e-2, "--lora_rank": 4}], ids=["full", "lora"])
def test_kl_to_the_initial_policy(train, tmp_path, flags):
    """0 until the first update, above 0 from then on; the same on four processes, in pairs that share each sample."""
    options = {"--kl_weight": 0.01, "--updates_per_iteration": 1} | flags
    train(tmp_path / "one", options)
    kl = [row["policy/kl"] for row in metrics_of(tmp_path / "one")]
    assert abs(kl[0]) < 1e-9
    assert all(value > 1e-7 for value in kl[1:]), kl
    train(tmp_path / "four", options, {"--sp_size": 2}, processes=4)
    assert [row["policy/kl"] for row in metrics_of(tmp_path / "four")] == pytest.approx(kl, rel=1e-2, abs=1e-9)


@torch.no_grad()
def test_lora_export(train, tmp_path):
    """The merged weights, and the adapter that the pipeline loads onto the base, are one network; only attention layers changed."""
    run = tmp_path / "run"
    train(run, {"--lora_rank": 4, "--learning_rate": 1e-2, "--ema_decay": 0})
    merged = FluxTransformer2DModel.from_pretrained(run / "export", subfolder="transformer")
    initial, exported = weights_of(MODEL / "transformer"), weights_of(run / "export" / "transformer")
    changed = {name for name in initial if not torch.equal(initial[name], exported[name])}
    assert changed
    assert all(".attn." in name and name.endswith(".weight") for name in changed)

    pipeline = FluxPipeline.from_pretrained(MODEL)
    inputs = {
        "hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)),
        "pooled_projections": torch.randn(2, 64, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(None, 4, 4, "cpu", torch.float32),
        "txt_ids": torch.zeros(16, 3),
    }
    base_output = pipeline.transformer(**inputs).sample
    pipeline.load_lora_weights(run / "export" / "lora")
    adapted_output = pipeline.transformer(**inputs).sample
    assert (adapted_output - base_output).abs().max() > 1e-3
    assert (merged(**inputs).sample - adapted_output).abs().max() < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16(train, tmp_path, stage):
    """Equal batches for rollout and update, so that bfloat16 kernels round both alike."""
    batches = {"--rollout_batch_size": 6, "--micro_batch_size": 6, "--old_log_prob": "recompute"}
    result = train(tmp_path / "run", {"--dtype": "bfloat16", "--zero_stage": stage, "--iterations": 2}, batches)
    assert "bfloat16" in result.stdout
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["policy/ratio_max_dev"] == 0
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "run" / "export" / "transformer").values()} == {torch.bfloat16}


@pytest.mark.parametrize("clip_range", [1e-6, 1e-2])
def test_bfloat16_without_a_cure(train, tmp_path, clip_range):
    """Where the batch's shape changes bfloat16's rounding, the run either stays within the clip range or stops and names the cure."""
    batches = {"--rollout_batch_size": 8, "--micro_batch_size": 1, "--clip_range": clip_range}
    result = train(tmp_path / "run", {"--dtype": "bfloat16", "--iterations": 1}, batches, check=False)
    if result.returncode == 0:
        assert metrics_of(tmp_path / "run")[0]["policy/ratio_max_dev"] <= clip_range
    else:
        assert result.returncode == 2
        assert "before the first update, max |ratio - 1| is" in result.stderr
        assert "--old_log_prob recompute cures it" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_offload(train, tmp_path, processes):
    """The optimiser on the CPU makes the same steps. DeepSpeed compiles it the first time."""
    train(tmp_path / "plain", {"--zero_stage": 2})
    train(tmp_path / "run", {"--zero_stage": 2, "--offload": (), "--kl_weight": 1e-9}, processes=processes)
    for row, expected in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "plain"), strict=True):
        assert row["reward/aesthetic_mean"] == pytest.approx(expected["reward/aesthetic_mean"], rel=1e-3)
        assert row["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-3)
    exported, plain = (weights_of(tmp_path / name / "export" / "transformer") for name in ("run", "plain"))
    assert largest_difference(exported, plain) < 1e-4
