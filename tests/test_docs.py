"""The documentation: links and paths lead somewhere, flags exist, and numbers that follow from the code are those that the code gives."""

import dataclasses
import difflib
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from benchmarks import memory
from benchmarks.full_size import MODELS

FILES = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
PAGES = [REPOSITORY / file for file in FILES if file.endswith(".md")]
PYTHON = [REPOSITORY / file for file in FILES if file.endswith(".py") and not file.startswith("tests/")]
# By the reader, as are all that have NAME in their names
TO_BE_WRITTEN = {"FILE.py", "colourful.py", "brightness.py", "palette.py", "hpsv3_reward.py", "my_detector.py"}
# fmt: off
OTHERS_FLAGS = {  # of torchrun, TensorBoard, pip, pytest, SLURM, Docker, hf and what else the pages tell people to run
    "no", "standalone", "nproc_per_node", "no-build-isolation", "no-deps", "nodes", "gpus-per-node", "time", "signal", "nodelist", "batch",
    "requeue", "overlap", "jobid", "pid", "nv", "pwd", "bind", "container-image", "container-workdir", "container-mounts", "numprocesses",
    "include", "exclude", "local-dir", "help", "data-binary", "write", "repo-type", "full",
    "logdir",
}
# fmt: on


def name(page) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if not target.startswith("http")]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    """Those of the repository: in its folders, and its scripts."""
    folders = "benchmarks|docs|examples|fastvideo|preprocess|scripts|shapes|tests"
    named = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w\.(?:py|sh|txt|md|jsonl)|\w+\.(?:py|sh))(?![\w*])", page.read_text()))
    named = {file for file in named if "NAME" not in file and Path(file).name not in TO_BE_WRITTEN}
    missing = [file for file in named if not any(path == file or ("/" not in file and path.endswith(f"/{file}")) for path in FILES)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_are_in_the_files_that_they_are_said_to_be_in(page):
    said = re.findall(r"`(\w+)` (?:in|of) `((?:\w+/)*\w+\.(?:py|sh))`", page.read_text())
    assert [(word, file) for word, file in said if word not in (REPOSITORY / file).read_text()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_that_are_named_exist(page):
    fields = {field for path in PYTHON for field in re.findall(r"^    (\w+): ", path.read_text(), re.MULTILINE)}
    flags = {flag.strip("_-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text())}
    unknown = {flag for flag in flags if flag not in fields and flag.removeprefix("no-") not in fields}
    assert unknown - OTHERS_FLAGS == set()


def changed_lines(parent: str, child: str) -> int:
    """As `diff | grep -c '^[<>]'` counts them."""
    lines = [(REPOSITORY / path).read_text().splitlines() for path in (parent, child)]
    blocks = difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks()
    return sum(map(len, lines)) - 2 * sum(block.size for block in blocks)


def ceiling(tokens: int, text_tokens: int, processes: int) -> float:
    return (tokens + text_tokens) / (tokens / processes + text_tokens)


def reduction_errors(processes: int) -> tuple[float, float]:
    """Percent of the norm of a sum of independent gradients that is lost in bfloat16: added one after another, and in pairs."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(processes, 100_000, generator=generator).bfloat16()
    exact, ring = pairs.double().sum(0), pairs[0]
    for gradient in pairs[1:]:
        ring = ring + gradient
    while len(pairs) > 1:
        pairs = pairs[::2] + pairs[1::2]
    return tuple(100 * float((found.double() - exact).norm() / exact.norm()) for found in (ring, pairs[0]))


def last_steps_share(num_steps: int, falling: float = 0) -> float:
    """Percent of all trained steps' squared sensitivity that the last one has, with Stable Diffusion v1.4's betas; eta ~ t^falling."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar, stride = (1 - betas).cumprod(0), 1000 // num_steps
    t = torch.arange(num_steps - 1, 0, -1) * stride + 1  # without the last transition, which is not trained
    a, b = alpha_bar[t], alpha_bar[t - stride]
    std = (t / t[0]) ** falling * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    squares = (((1 - b - std**2).sqrt() - (b * (1 - a) / a).sqrt()) / std) ** 2
    return 100 * float(squares[-1] / squares.sum())


def computed() -> list[tuple[str, str, tuple[float, ...]]]:
    """Page, pattern of a sentence, and the numbers in its groups."""
    flux, hunyuan, wan = (MODELS[model] for model in ("flux.1-dev", "hunyuan_video", "wan_2.1_t2v_1.3b"))
    text = hunyuan.cached["prompt_embeds"][0], flux.cached["prompt_embeds"][0]
    clip, picture = math.prod(hunyuan.latents[1:]) // 4, flux.latents[0]
    with torch.device("meta"):
        heads = [model.network[0](**model.network[1]).config.num_attention_heads for model in (flux, hunyuan, wan)]
    wan_script = "train_grpo_wan.py"
    assert heads[0] == heads[1]
    return [
        (
            "docs/parallelism.md",
            r"A clip of ([\d,]+)\s+tokens with (\d+) of text: ([\d.]+) for 2, ([\d.]+) for 8",
            (clip, text[0], ceiling(clip, text[0], 2), ceiling(clip, text[0], 8)),
        ),
        (
            "docs/parallelism.md",
            r"FLUX at 720 px \(([\d,]+) and (\d+)\): ([\d.]+) for 2, ([\d.]+) for 8",
            (picture, text[1], ceiling(picture, text[1], 2), ceiling(picture, text[1], 8)),
        ),
        ("docs/parallelism.md", r"heads \((\d+) in FLUX and HunyuanVideo, (\d+) in Wan", (heads[0], heads[2])),
        ("docs/parallelism.md", r"HunyuanVideo in bfloat16: (\d+) GB", (2 * hunyuan.parameters / 1e9,)),
        ("docs/parallelism.md", r"(\d+) GB for FLUX.1-dev in bfloat16", (2 * flux.parameters / 1e9,)),
        ("docs/parallelism.md", r"of 64 processes the error is ([\d.]+) %[^(]+ ([\d.]+) % if in pairs", reduction_errors(64)),
        ("docs/parallelism.md", r"million elements: ([\d.]+) GB in bfloat16", (2 * 200e6 * 2 / 1e9,)),
        ("docs/models.md", r"holds weights, ([\d.]+) GB", (2 * hunyuan.parameters / 1e9,)),
        ("docs/models.md", r"([\d.]+) GB on 64 GPUs, ([\d.]+) GB on 32", tuple(22 * hunyuan.parameters / gpus / 1e9 for gpus in (64, 32))),
        ("docs/models.md", r"network is there twice, (\d+) GiB", (4 * hunyuan.parameters / 2**30,)),
        *(
            ("docs/models.md", rf"\| {row} \| (\d+) GB \| (\d+) GB", tuple(n * 16 * MODELS[key].parameters / 1e9 for n in (1, 4)))
            for row, key in (
                ("Stable Diffusion v1.4", "sd_v1.4"),
                ("FLUX.1-dev", "flux.1-dev"),
                ("HunyuanVideo, SkyReels-V1-I2V", "hunyuan_video"),
                ("Wan 2.1 T2V 1.3B", "wan_2.1_t2v_1.3b"),
            )
        ),
        ("docs/parallelism.md", r"so (\d+) GB for FLUX.1-dev; `--keep", (16 * 12,)),  # with N = 12e9, as the page says
        ("docs/paper_to_code.md", r"it has (\d+) % at T = 50 and (\d+) % at T = 8", (last_steps_share(50), last_steps_share(8))),
        (
            "docs/paper_to_code.md",
            r"(\d+) % of all squared sensitivity at T = 50 \((\d+) % with `constant`\)",
            (last_steps_share(50, falling=0.5), last_steps_share(50)),
        ),
        (
            "docs/new_model.md",
            r"`train_grpo_skyreels.py` in (\d+) of (\d+) lines",
            (changed_lines("train_grpo_skyreels.py", wan_script), len((REPOSITORY / wan_script).read_text().splitlines())),
        ),
        (
            "docs/new_model.md",
            r"`preprocess/embed_wan.py` from `embed_sd.py` in (\d+)",
            (changed_lines("preprocess/embed_sd.py", "preprocess/embed_wan.py"),),
        ),
    ]


@pytest.mark.parametrize(("page", "sentence", "numbers"), [pytest.param(*case, id=case[1][:40]) for case in computed()])
def test_numbers_are_those_of_the_code(page, sentence, numbers):
    """To the places that the page gives."""
    written_numbers_are(page, sentence, numbers)


def written_numbers_are(page: str, sentence: str, numbers: tuple[float, ...]) -> None:
    found = re.findall(sentence, (REPOSITORY / page).read_text())
    assert len(found) == 1, f"the sentence is gone from {page}: mend it here too"
    written = (found[0],) if isinstance(found[0], str) else found[0]
    for word, number in zip(written, numbers, strict=True):
        digits = len(word.partition(".")[2])
        assert float(word.replace(",", "")) == round(number, digits), f"{page} says {word}, the code {number}"


QUICK = "sd_v1.4"
TITLES = {
    "sd_v1.4": "Stable Diffusion v1.4",
    "flux.1-dev": "FLUX.1-dev",
    "hunyuan_video": "HunyuanVideo",
    "skyreels_i2v": "SkyReels-V1-I2V",
    "wan_2.1_t2v_1.3b": "Wan 2.1 T2V 1.3B",
}


@pytest.mark.parametrize("model", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in TITLES])
def test_memory_is_what_its_benchmark_computes(model):
    """docs/models.md: the table, that of fewer GPUs, and of HunyuanVideo and SkyReels the sentences beside them, in GiB."""
    module, args, gpus = memory.launch_settings(MODELS[model], [])
    sp_size = getattr(args, "sp_size", 1)
    found = memory.measure(module, MODELS[model], args, sp_size)
    page, at_launch = "docs/models.md", memory.row(found, args, gpus, args.zero_stage, sp_size)
    training = max(at_launch[phase] for phase in ("sampling", "decoding", "update"))
    numbers = gpus, training / 2**30, at_launch["start"] / 2**30, 2 * MODELS[model].parameters / 1e9
    written_numbers_are(page, rf"\| {re.escape(TITLES[model])} \| (\d+) \| (\d+) \| (\d+) \| (\d+) GB \|", numbers)
    lines = re.findall(rf"^\| {re.escape(TITLES[model])}, `--zero_stage (\d)(.*)` \|", (REPOSITORY / page).read_text(), re.MULTILINE)
    assert len(lines) == {"flux.1-dev": 1, "hunyuan_video": 3, "skyreels_i2v": 3}.get(model, 0)
    for stage, flags in lines:
        settings = dataclasses.replace(args, gather_for_rollout=flags != " --no-gather_for_rollout")
        rows = [memory.row(found, settings, fewer, int(stage), sp_size) for fewer in (32, 16, 8)]
        pattern = rf"\| {re.escape(TITLES[model])}, `--zero_stage {stage}{flags}` \| (\d+) \| (\d+) \| (\d+) \|"
        written_numbers_are(page, pattern, tuple(row["peak"] / 2**30 for row in rows))
    if len(lines) == 3:
        written_numbers_are(page, rf"([\d.]+) GiB for {TITLES[model].partition('-')[0]} \(", (found["update"] / 2**30,))
        written_numbers_are(page, r"VAE and VideoAlign, ([\d.]+) GiB", (at_launch["others"] / 2**30,))
    if model == "hunyuan_video":
        written_numbers_are(page, r"samples \((\d+) GiB\)", (rows[-1]["kept"] / 2**30,))


LORA = "--prompts_per_iteration 1 --best_of_n 0 --rewards aesthetic --reward_weights 1 --lora_rank 32 --gradient_checkpointing"
MEASURED = {  # as docs/gpu.md has the flags: its row, and the peak of one H100 that it gives
    "flux.1-dev": (
        ("FLUX.1-dev, 720 x 720", "--num_generations 12 --updates_per_iteration 4 --rollout_batch_size 4 --micro_batch_size 4"),
        ("the same", "--num_generations 4 --updates_per_iteration 1 --rollout_batch_size 4 --micro_batch_size 1"),
    ),
    "hunyuan_video": (
        (
            "HunyuanVideo, 480 x 480, 53 frames",
            "--num_generations 2 --updates_per_iteration 1 --rollout_batch_size 1 --micro_batch_size 1 --vae_tiling --sp_size 1",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "title", "flags"), [(model, *case) for model, cases in MEASURED.items() for case in cases])
def test_memory_computed_beside_measured(model, title, flags):
    """benchmarks/README.md: docs/gpu.md's peak of one H100, and what the benchmark computes for the same flags."""
    given = re.search(rf"^\| {title} \| `(.*?)` \|.* ([\d.]+) GiB \|", (REPOSITORY / "docs/gpu.md").read_text(), re.MULTILINE)
    assert set(given[1].split()) <= set(flags.split())
    module, args, _ = memory.launch_settings(MODELS[model], f"{LORA} {flags}".split())
    computed = memory.row(memory.measure(module, MODELS[model], args, 1), args, 1, 2, 1)["peak"] / 2**30
    assert computed == pytest.approx(float(given[2]), rel=0.02)
    micro_batch = rf" \| {args.micro_batch_size} \| ([\d.]+) \| ([\d.]+) \|"
    written_numbers_are("benchmarks/README.md", rf"\| {TITLES[model]}{micro_batch}", (float(given[2]), computed))
