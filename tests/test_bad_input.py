"""What a user can get wrong ends the run with one sentence that names it, exit code 2 and no traceback, before anything is trained;
a reward that fails in the middle of a run leaves a checkpoint to go on from."""

import shutil
from pathlib import Path

import pytest
from conftest import MODEL, REPOSITORY, TRAIN, launch, metrics_of, run_script, weights_of

import evaluate
import train_grpo_flux
from fastvideo.errors import UserError

# ------------------------------------------------------------------------------------------------------------ values of flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": ("beauty",)}, "--rewards: unknown reward 'beauty'; known names are shapes"),
        ({"rewards": ("shapes", "shapes@0.5")}, "--rewards: 'shapes' is given twice"),
        ({"rewards": ("shapes@high",)}, "--rewards: the threshold 'high' in 'shapes@high' is not a number"),
        ({"rewards": ()}, "--rewards needs at least one reward"),
        ({"reward_weights": (1.0, 2.0)}, "--reward_weights has 2 numbers for 1 --rewards"),
        ({"iterations": 0}, "--iterations is 0, but must be above 0"),
        ({"num_generations": 1, "updates_per_iteration": 1}, "--num_generations is 1, but must be at least 2"),
        ({"sampling_steps": 1}, "--sampling_steps is 1, but must be at least 2"),
        ({"prompts_per_iteration": -8}, "--prompts_per_iteration is -8, but must be above 0"),
        ({"micro_batch_size": 0}, "--micro_batch_size is 0, but must be above 0"),
        ({"rollout_batch_size": -1}, "--rollout_batch_size is -1, but must be above 0"),
        ({"checkpoint_every": 0}, "--checkpoint_every is 0, but must be above 0"),
        ({"keep_checkpoints": 0}, "--keep_checkpoints is 0, but must be above 0"),
        ({"clip_range": 0.0}, "--clip_range is 0.0, but must be above 0"),
        ({"noise_level": -0.3}, "--noise_level is -0.3, but must be above 0"),
        ({"shift": 0.0}, "--shift is 0.0, but must be above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan, but must be above 0"),
        ({"learning_rate": float("inf")}, "--learning_rate is inf, but must be above 0"),
        ({"kl_weight": -0.1}, "--kl_weight is -0.1, but must be 0 or more"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm is -1.0, but must be 0 or more"),
        ({"lora_rank": -1}, "--lora_rank is -1, but must be 0 or more"),
        ({"timestep_fraction": 0.0}, "--timestep_fraction is 0.0, but must be above 0 and at most 1"),
        ({"timestep_fraction": 1.1}, "--timestep_fraction is 1.1, but must be above 0 and at most 1"),
        ({"timestep_fraction": float("nan")}, "--timestep_fraction is nan"),
        ({"ema_decay": 1.0}, "--ema_decay is 1.0, but must be at least 0 and below 1"),
        ({"best_of_n": 3}, "--best_of_n is 3, but must be even and at most --num_generations 12"),
        ({"best_of_n": 14}, "--best_of_n is 14, but must be even and at most --num_generations 12"),
        ({"updates_per_iteration": 5}, "--updates_per_iteration 5 does not divide --num_generations 12"),
        ({"best_of_n": 6}, "--updates_per_iteration 4 does not divide --best_of_n 6"),
        ({"sde_window": (-1, 2)}, "--sde_window -1 2 must lie within the first 24 of --sampling_steps 25"),
        ({"sde_window": (0, 0)}, "--sde_window 0 0 must lie within"),
        ({"sde_window": (20, 5)}, "--sde_window 20 5 must lie within"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, message):
    paths = {name: Path(name) for name in ("model", "embeddings", "output_dir")}
    with pytest.raises(UserError) as error:
        train_grpo_flux.Args(**paths | {"rewards": ("shapes",)} | arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": ("beauty",)}, "--rewards: unknown reward 'beauty'"),
        ({"num_seeds": 0}, "--num_seeds is 0, but must be above 0"),
        ({"batch_size": -1}, "--batch_size is -1, but must be above 0"),
        ({"shift": 0.0}, "--shift is 0.0, but must be above 0"),
        ({"sampling_steps": 0}, "--sampling_steps is 0, but must be above 0"),
        ({"height": -32}, "--height is -32, but must be above 0"),
    ],
    ids=str,
)
def test_values_out_of_range_in_evaluation(arguments, message):
    paths = {name: Path(name) for name in ("model", "prompts", "output_dir")}
    with pytest.raises(UserError) as error:
        evaluate.Args(**paths | {"rewards": ("shapes",)} | arguments)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------------ the whole script


@pytest.fixture
def sentence_of(train, tmp_path):
    """Function from flags to the one sentence that ends their run, in which nothing may have been trained."""

    def end(*flags: object, processes: int = 1) -> str:
        result = train(tmp_path / "run", *flags, processes=processes, check=False)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        return the_sentence(result.stderr, tmp_path / "run")

    return end


def the_sentence(stderr: str, run: Path) -> str:
    assert not run.exists()
    sentences = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, stderr
    return sentences[0]


@pytest.fixture
def model_copy(tmp_path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache_copy(cache, tmp_path) -> Path:
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache"


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def weights_file(model: Path, subfolder: str) -> Path:
    return next((model / subfolder).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "--model: there is no folder {model}"),
        (lambda model: shutil.rmtree(model / "transformer"), "--model: there is no folder {model}/transformer"),
        (lambda model: shutil.rmtree(model / "vae"), "--model: there is no folder {model}/vae"),
        (lambda model: truncate(weights_file(model, "transformer")), "--model: {model}/transformer cannot be loaded"),
        (lambda model: truncate(weights_file(model, "vae")), "--model: {model}/vae cannot be loaded"),
        (lambda model: (model / "transformer" / "config.json").unlink(), "--model: {model}/transformer has no config.json"),
        (lambda model: (model / "vae" / "config.json").write_text("{"), "--model: {model}/vae cannot be loaded"),
        (lambda model: flip_a_bit(weights_file(model, "text_encoder"), -1), "was made with text_encoder 'sha256:"),
        (lambda model: flip_a_bit(weights_file(model, "text_encoder_2"), -1), "was made with text_encoder_2 'sha256:"),
    ],
    ids=[
        *("no_model", "no_transformer", "no_vae", "truncated_transformer", "truncated_vae", "no_config", "broken_config"),
        *("another_clip", "another_t5"),
    ],
)
def test_broken_model(sentence_of, model_copy, break_it, message):
    break_it(model_copy)
    sentence = sentence_of({"--model": model_copy})
    assert message.format(model=model_copy) in sentence
    if "sha256" in message:
        assert f"but {model_copy} has 'sha256:" in sentence


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "{cache} is not a finished embedding cache: it has no index.json"),
        (lambda cache: (cache / "index.json").unlink(), "{cache} is not a finished embedding cache: it has no index.json"),
        (lambda cache: truncate(cache / "index.json"), "{cache}/index.json is damaged"),
        (lambda cache: truncate(cache / "shard-00001-of-00003.safetensors"), "cannot read {cache}/shard-00001-of-00003.safetensors"),
        (lambda cache: flip_a_bit(cache / "shard-00001-of-00003.safetensors", -5), "{cache}/shard-00001-of-00003.safetensors is damaged"),
        (lambda cache: (cache / "shard-00002-of-00003.safetensors").unlink(), "{cache}/shard-00002-of-00003.safetensors"),
    ],
    ids=["no_cache", "no_index", "truncated_index", "truncated_shard", "altered_shard", "no_shard"],
)
def test_broken_cache(sentence_of, cache_copy, break_it, message):
    break_it(cache_copy)
    assert message.format(cache=cache_copy) in sentence_of({"--embeddings": cache_copy})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--rewards": "beauty"}, "--rewards: unknown reward 'beauty'"),
        ({"--rewards": "shapes=somewhere"}, "--rewards: shapes takes no path, but was given shapes=somewhere"),
        ({"--rewards": "clip=/nowhere"}, "/nowhere"),
        ({"--height": 36}, "--height 36 and --width 32 must be multiples of 8"),
        ({"--offload": (), "--zero_stage": 0}, "--offload moves what ZeRO shards, but --zero_stage is 0"),
        ({"--dtype": "bfloat16", "--zero_stage": 0}, "--zero_stage 0 keeps no float32 master weights, which --dtype bfloat16 needs"),
        ({"--attention": "flash"}, "--attention flash cannot be used here"),
        ({"--attention": "magic"}, "--attention magic cannot be used here"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{name}={flag}" for name, flag in value.items()),
)
def test_settings_that_cannot_be_used(sentence_of, flags, message):
    assert message in sentence_of(flags)


def test_wrong_model_kind(sentence_of):
    """A folder that has no diffusers model in it at all."""
    assert "is no diffusers folder: it has no model_index.json" in sentence_of({"--model": REPOSITORY / "shapes" / "prompts"})


def test_two_processes_say_it_once(sentence_of, cache_copy):
    flip_a_bit(cache_copy / "shard-00001-of-00003.safetensors", -5)  # the second process checks this one
    assert "shard-00001-of-00003.safetensors is damaged" in sentence_of({"--embeddings": cache_copy}, processes=2)
    message = "--prompts_per_iteration 3 does not divide among 2 processes"
    assert message in sentence_of({"--prompts_per_iteration": 3}, processes=2)


# -------------------------------------------------------------------------------------------------- the command as users give it


def test_command_line(run_flags, tmp_path):
    run = tmp_path / "run"
    result = launch(TRAIN, *run_flags(run, {"--rewards": "beauty"}))
    assert result.returncode == 2
    assert "unknown reward 'beauty'" in the_sentence(result.stderr, run)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [(("--iteration", 5), "--iteration"), (("--zero_stage", 4), "zero_stage"), (("--iterations", "many"), "iterations"), (None, "--model")],
    ids=["unknown_flag", "no_such_choice", "no_number", "missing_flags"],
)
def test_flags_that_cannot_be_parsed(train, run_flags, tmp_path, change, message):
    flags = ({"--rewards": "shapes"},) if change is None else run_flags(tmp_path / "run", dict([change]))
    result = run_script(TRAIN, *flags, log=tmp_path / "log")
    assert result.returncode == 2
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_says_it_once(run_flags, tmp_path):
    run = tmp_path / "run"
    for flags, message in (
        ({"--prompts_per_iteration": 3}, "--prompts_per_iteration 3 does not divide among 2 processes"),
        ({"--rewards": "beauty"}, "--rewards: unknown reward 'beauty'"),
    ):
        result = launch(TRAIN, *run_flags(run, flags), processes=2)
        assert result.returncode != 0
        assert message in the_sentence(result.stderr, run)
        assert result.stderr.count(message) == 1


# ---------------------------------------------------------------------------------------------- rewards that fail on the way

# Registers the reward "sick=MODE", which misbehaves at one call of one process. Two are the preflight's, then there are two an iteration.
SICK_REWARD = """
import train_grpo_flux
from fastvideo.parallel import distributed
from fastvideo.rewards import REWARDS

def load(mode, device):
    calls = 0

    def reward(media, rows):
        nonlocal calls
        calls += 1
        scores = media.mean((1, 2, 3))
        if calls == SICK_CALL and distributed.launch_rank() == SICK_RANK:
            if mode in ("nan", "inf"):
                scores[1] = float(mode)
            elif mode == "shape":
                scores = scores[:, None]
            elif mode == "raise":
                raise RuntimeError("the scorer is out of paint")
        return scores

    return reward

REWARDS["sick"] = load
distributed.run(train_grpo_flux.main)
"""


def sick_script(folder: Path, call: int, rank: int) -> Path:
    path = folder / "sick.py"
    path.write_text(SICK_REWARD.replace("SICK_CALL", str(call)).replace("SICK_RANK", str(rank)))
    return path


def sick_flags(processes: int, mode: str) -> dict:
    flags = {"--prompts_per_iteration": 2 * processes, "--rollout_batch_size": 4, "--iterations": 4, "--checkpoint_every": 10}
    return flags | {"--rewards": f"sick={mode}"}


@pytest.fixture(scope="module")
def healthy_runs(train, tmp_path_factory) -> dict[int, Path]:
    """What mended runs must equal, for 1 and 2 processes."""
    runs = {processes: tmp_path_factory.mktemp("healthy") / "run" for processes in (1, 2)}
    for processes, run in runs.items():
        train(run, sick_flags(processes, "healthy"), script=sick_script(run.parent, 0, 0), processes=processes)
    return runs


@pytest.mark.parametrize(
    ("mode", "processes", "iteration", "message"),
    [
        ("nan", 1, 1, "reward 'sick' is nan for a sample of the prompt '"),
        ("inf", 1, 3, "reward 'sick' is inf for a sample of the prompt '"),
        ("raise", 1, 3, "reward 'sick' failed on a batch of 4 that begins with the prompt '"),
        ("shape", 1, 3, "reward 'sick' returned shape (4, 1) for 4 samples; it must be (4,)"),
        ("nan", 2, 3, "reward 'sick' is nan for a sample of the prompt '"),
        ("raise", 2, 1, "reward 'sick' failed on a batch of 4 that begins with the prompt '"),
    ],
)
def test_failing_reward(train, healthy_runs, tmp_path, mode, processes, iteration, message):
    """The last process's reward fails: all stop in that iteration, and with a mended reward go on as if nothing had happened."""
    script, run = sick_script(tmp_path, 2 + 2 * iteration - 1, processes - 1), tmp_path / "run"
    result = train(run, sick_flags(processes, mode), script=script, processes=processes, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, result.stderr
    assert message in sentences[0]
    assert (mode == "raise") == ("RuntimeError: the scorer is out of paint" in sentences[0])
    assert not (run / "metrics.jsonl").exists() if iteration == 1 else [row["iteration"] for row in metrics_of(run)] == [1, 2]
    if iteration == 1:  # nothing was learned
        assert not (run / "checkpoints").exists()
    else:
        assert (run / "checkpoints" / "latest").read_text() == f"iteration_{iteration - 1:06d}"

    train(run, sick_flags(processes, "healthy"), "--allow_changed_args", script=script, processes=processes)
    assert metrics_of(run) == metrics_of(healthy_runs[processes])
    resumed, expected = (weights_of(folder / "export" / "transformer") for folder in (run, healthy_runs[processes]))
    assert all(resumed[name].equal(expected[name]) for name in expected)
