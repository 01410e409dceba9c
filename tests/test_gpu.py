"""On a GPU: NCCL, CUDA kernels, bfloat16, through the same scripts as everywhere. Skipped where there is none.

bash scripts/test.sh -m gpu
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL_RUN, command, launch, metrics_of, weights_of
from test_families import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
PROMPTS = REPOSITORY / "shapes" / "prompts"
ALL = CASES | {"flux": Case("flux", {"--rewards": ("aesthetic",)})}


def run_on_gpu(script: Path, *flags: object, check: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command(script, *flags), env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0 or not check, result.stderr
    return result


@pytest.fixture(scope="session")
def cache_of(tmp_path_factory):
    """Function from a family to the embeddings of eight of its prompts, made on the GPU in float32."""
    made = {}

    def make(family: Case) -> Path:
        if family.name not in made:
            folder = tmp_path_factory.mktemp(family.name)
            lines = (PROMPTS / family.prompts).read_text().splitlines()[::50][:8]
            rows = [json.loads(line) if line.startswith("{") else {"prompt": line} for line in lines]
            rows = [row | ({"image": str(PROMPTS / row["image"])} if "image" in row else {}) for row in rows]
            (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            flags = {"--model": family.model, "--prompts": folder / "prompts.jsonl", "--output_dir": folder / "cache", "--dtype": "float32"}
            flags |= {"--height": 32, "--width": 32} if family.facts.from_images else {}
            run_on_gpu(REPOSITORY / "preprocess" / f"embed_{family.name}.py", flags)
            made[family.name] = folder / "cache"
        return made[family.name]

    return make


def flags_of(family: Case, cache: Path, run: Path, *others: dict) -> dict:
    flags = SMALL_RUN | {"--model": family.model, "--embeddings": cache, "--output_dir": run, "--rewards": family.rewards}
    flags |= {"--sampling_steps": 20 if family.ddim else 6, "--noise_level": 0.7, "--num_generations": 8} | family.flags
    for other in others:
        flags |= other
    return flags


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
def test_bfloat16(cache_of, family, tmp_path):
    """A recomputed log-prob makes the ratio 1; training moves the weights; what is printed is how far a rollout's log-prob is off."""
    flags = flags_of(family, cache_of(family), tmp_path / "run", {"--old_log_prob": "recompute", "--iterations": 2})
    result = run_on_gpu(family.script, flags)
    assert "cuda, torch.bfloat16" in result.stdout
    rows = metrics_of(tmp_path / "run")
    assert [row["policy/ratio_max_dev"] for row in rows] == [0, 0]
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    assert weights_of(tmp_path / "run" / "export" / family.network)
    for sizes in ({"--rollout_batch_size": 8, "--micro_batch_size": 8}, {"--rollout_batch_size": 5, "--micro_batch_size": 12}):
        flags = flags_of(family, cache_of(family), tmp_path / f"rollout{sizes['--micro_batch_size']}", sizes, {"--clip_range": 0.5})
        run_on_gpu(family.script, flags | {"--iterations": 1})
        deviation = metrics_of(Path(flags["--output_dir"]))[0]["policy/ratio_max_dev"]
        print(f"{family.name}, bfloat16, {sizes}: max |ratio - 1| with the rollout's log-probs is {deviation:.1e}")


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
def test_float32_is_what_a_cpu_computes(cache_of, family, tmp_path):
    others = {"--dtype": "float32", "--iterations": 2}
    run_on_gpu(family.script, flags_of(family, cache_of(family), tmp_path / "gpu", others))
    result = launch(family.script, flags_of(family, cache_of(family), tmp_path / "cpu", others))
    assert result.returncode == 0, result.stderr
    for gpu, cpu in zip(metrics_of(tmp_path / "gpu"), metrics_of(tmp_path / "cpu"), strict=True):
        assert gpu["policy/ratio_max_dev"] < 1e-5
        for name in [name for name in cpu if name.endswith(("_mean", "grad_norm")) and name.startswith(("reward/", "policy/"))]:
            print(f"{family.name}, iteration {gpu['iteration']}, {name}: {gpu[name]:.6g} on the GPU, {cpu[name]:.6g} on the CPU")
            assert gpu[name] == pytest.approx(cpu[name], rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages(cache_of, stage, tmp_path):
    """DeepSpeed's stages on NCCL make the same training."""
    family = ALL["flux"]
    for run, others in (("stage", {"--zero_stage": stage}), ("other", {"--zero_stage": 2})):
        others |= {"--dtype": "float32"} if stage == 0 else {"--old_log_prob": "recompute"}
        run_on_gpu(family.script, flags_of(family, cache_of(family), tmp_path / run, others))
    for row, other in zip(metrics_of(tmp_path / "stage"), metrics_of(tmp_path / "other"), strict=True):
        assert row["reward/aesthetic_mean"] == pytest.approx(other["reward/aesthetic_mean"], abs=1e-3 if stage == 0 else 2e-2)


@pytest.mark.parametrize(
    "others",
    [{"--offload": ()}, {"--gradient_checkpointing": ()}, {"--lora_rank": 4}, {"--kl_weight": 0.1}, {"--attention": "_native_flash"}],
)
def test_options(cache_of, others, tmp_path):
    family = ALL["flux"]
    run_on_gpu(family.script, flags_of(family, cache_of(family), tmp_path / "run", others, {"--old_log_prob": "recompute"}))
    assert metrics_of(tmp_path / "run")[0]["policy/ratio_max_dev"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume(cache_of, dtype, tmp_path):
    """Stopped and gone on with. GPUs add in no fixed order, so that this is no promise of equal bits; what differs is printed."""
    family = ALL["flux"]
    others = {"--dtype": dtype, "--old_log_prob": "recompute"}
    run_on_gpu(family.script, flags_of(family, cache_of(family), tmp_path / "whole", others, {"--iterations": 4}))
    for iterations in (2, 4):
        run_on_gpu(family.script, flags_of(family, cache_of(family), tmp_path / "parts", others, {"--iterations": iterations}))
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert [row["iteration"] for row in parts] == [1, 2, 3, 4]
    print(f"{dtype}: the resumed run is {'the same bit for bit' if whole == parts else 'not the same bit for bit'}")
    for row, other in zip(whole, parts, strict=True):
        assert row["reward/aesthetic_mean"] == pytest.approx(other["reward/aesthetic_mean"], abs=1e-4 if dtype == "float32" else 1e-2)
