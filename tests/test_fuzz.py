"""Whatever stands in a file or among the flags, it is read, or refused in one sentence (`UserError`): no traceback, no hang, no memory for
sizes that a file merely claims, nothing written or read outside of what was given, nothing unpickled.

Each target makes inputs by changing good ones (`fuzz_inputs`) and reads them. By default a few hundred are tried, and with `-m slow` over
10,000 that are refused: the same ones every time.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace

import diffusers
import matplotlib
import pytest
import torch
import torch.distributed as dist
import transformers
import tyro
from conftest import EVALUATE, REPOSITORY, TRAIN, run_script
from fuzz_inputs import changed_bytes, changed_files
from golden import make_hps
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_videoalign_reward import write_videoalign

import evaluate
from fastvideo.embeddings import encoders
from fastvideo.embeddings.cache import EmbeddingCache, write_cache
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.files import crc32
from fastvideo.media import read_video, save_video
from fastvideo.models import pretrained
from fastvideo.models.families import FAMILIES
from fastvideo.parallel.distributed import Ranks, init
from fastvideo.parallel.shards import Fragment
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.runs import checkpoint, guards, integrity, run_folder, tracking

sys.path.insert(0, str(REPOSITORY / "preprocess"))
import make_reference_images
import split_prompts

MODELS = REPOSITORY / "shapes" / "models"
CPU = torch.device("cpu")
SECONDS = 20  # that one input may take: it takes milliseconds, a hang takes for ever
GIBIBYTES = 4  # of address space that all inputs of a target together may add: a file that claims to be huge would take more

Read = Callable[[object], None]
Target = Callable[[Path], tuple[dict[str, bytes] | st.SearchStrategy, Read]]
TARGETS: dict[str, tuple[Target, int, int]] = {}  # name -> target, inputs by default, inputs with -m slow
REFUSED, ACCEPTED = defaultdict(set), defaultdict(set)  # different inputs, by target


def target(quick: int, slow: int) -> Callable[[Target], Target]:
    """Of a function that makes good files in a folder. It gives them, to be changed, or a strategy; and a function that reads one input."""

    def enter(function: Target) -> Target:
        TARGETS[function.__name__] = function, quick, slow
        return function

    return enter


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """The good files, by their paths in the folder."""
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def replaced(folder: Path, change: tuple[str, bytes]) -> Iterator[None]:
    """Meanwhile the file has another content, and its old time of modification; afterwards it is the good one."""
    path = folder / change[0]
    good, times = path.read_bytes(), path.stat()
    path.write_bytes(change[1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        yield
    finally:
        path.write_bytes(good)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# ------------------------------------------------------------------------------------------------ prompts, pictures, clips


@target(quick=30, slow=3000)
def prompt_files(folder: Path):
    for name in ("a", "b", "secret"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    rows = [
        {"prompt": "a red circle", "image": "a.png"},
        {"prompt": "é “two”", "image": "./b.png", "n": 1.5},
        {"prompt": "x", "image": "a.png"},
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "p.txt").write_bytes("a red circle\na blue square\r\n\n  two\u2028lines é\n".encode())

    def read(change):
        with replaced(folder, change):
            path = folder / change[0]
            rows, report = read_prompts(path, ("prompt", "image") if path.suffix == ".jsonl" else ("prompt",))
            assert len(rows) == len(report["lines"])
            if path.suffix == ".txt":
                make_reference_images.read_rows(str(path))

    return contents(folder, "p.*"), read


@target(quick=10, slow=400)
def prompt_lists(folder: Path):
    rows = [{"prompt": "a large red circle", "image": "a.png", "toxicity": 0.5}, {"prompt": "three blue squares there"}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "p.json").write_text(json.dumps(["a large red circle", *rows]))
    (folder / "p.csv").write_text('prompt,toxicity\n"a large, red circle",0.5\n"two\nlines of text",x\n')
    (folder / "p.txt").write_text("a large red circle\nthree blue squares there\n")

    def read(change):
        with replaced(folder, change):
            with command_line(
                "--inputs", folder / change[0], "--output_dir", folder / "out", "--heldout", 0, "--language", "any", "--overwrite"
            ):
                split_prompts.main()
            for path in (folder / "out").glob("train.*"):
                read_back = path.read_text(encoding="utf-8")
                assert read_back.endswith("\n")

    return contents(folder, "p.*"), read


@contextlib.contextmanager
def command_line(*words: object) -> Iterator[None]:
    before, sys.argv = sys.argv, ["script.py", *map(str, words)]
    try:
        yield
    finally:
        sys.argv = before


@target(quick=30, slow=2000)
def images(folder: Path):
    picture = Image.radial_gradient("L").resize((16, 16))
    for name, mode in (
        ("l.png", "L"),
        ("p.png", "P"),
        ("a.png", "RGBA"),
        ("i.png", "I;16"),
        ("b.png", "1"),
        ("c.jpg", "CMYK"),
        ("r.jpg", "RGB"),
    ):
        picture.convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    picture.save(folder / "exif.jpg", exif=exif)
    for name in ("x.gif", "x.tiff", "x.webp", "x.bmp"):
        picture.convert("RGB").save(folder / name)

    def read(change):
        with replaced(folder, change):
            row = {"prompt": "x", "image": str(folder / change[0])}
            rows = encoders.check_images([row], [1], "prompts.jsonl", (16, 16))
            assert encoders.read_image(rows[0]["image"]).mode == "RGB"

    return contents(folder, "*.*"), read


@target(quick=5, slow=600)
def made_images(folder: Path):
    """What make_reference_images.py finds of an earlier run."""
    (folder / "images").mkdir()
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(folder / "images" / "000000_0.png")
    (folder / "model" / "vae").mkdir(parents=True)
    (folder / "model" / "vae" / "config.json").write_text("{}")
    args = SimpleNamespace(model=folder / "model", output_dir=folder, height=16, width=16, num_inference_steps=2)
    args.guidance_scale, args.images_per_prompt, args.seed = 1.0, 1, 0
    pipeline = SimpleNamespace(components={"vae": 1}, dtype=torch.float32)
    make_reference_images.write_whole(folder / "settings.json", b"{}")
    with pytest.raises(UserError, match="was made with"):
        make_reference_images.prepare_folder(args, [{"prompt": "x"}], pipeline)
    (folder / "images" / "000000_0.png").rename(folder / "picture")
    make_reference_images.prepare_folder(args, [{"prompt": "x"}], pipeline)
    (folder / "picture").rename(folder / "images" / "000000_0.png")

    def read(change):
        with replaced(folder, change):
            make_reference_images.prepare_folder(args, [{"prompt": "x"}], pipeline)
            if not make_reference_images.is_finished(folder / "images" / "000000_0.png", args):
                raise UserError("it is made again")

    return contents(folder, "settings.json", "images/*.png"), read


@target(quick=5, slow=200)
def videos(folder: Path):
    save_video(folder / "x.mp4", torch.linspace(-1, 1, 3 * 4 * 32 * 32).view(3, 4, 32, 32), fps=4)

    def read(change):
        with replaced(folder, change):
            assert read_video(folder / "x.mp4").shape[0] == 3

    return contents(folder, "x.mp4"), read


# ---------------------------------------------------------------------------------------------------------- embedding caches


def small_cache(folder: Path, ranks: Ranks) -> Path:
    rows = [{"prompt": f"prompt {i}", "image": "a.png"} for i in range(5)] + [{"prompt": ""}]

    def encode(batch: list[dict]) -> dict[str, torch.Tensor]:
        return {"embeds": torch.ones(len(batch), 2, 3), "mask": torch.ones(len(batch), 2, dtype=torch.bool)}

    write_cache(folder / "cache", rows, encode, {"family": "flux", "text_encoder": "sha256:0"}, ranks, shard_size=4, batch_size=4)
    return folder / "cache"


@target(quick=20, slow=2500)
def caches(folder: Path):
    cache_dir = small_cache(folder, RANKS)

    def read(change):
        with replaced(cache_dir, change):
            cache = EmbeddingCache(cache_dir, {"family": "flux"}, RANKS)
            cache.get(list(range(len(cache))))
            assert cache.num_prompts in (5, 6)
            cache.get([cache.unconditional])

    return contents(cache_dir, "*"), read


@target(quick=5, slow=300)
def unfinished_caches(folder: Path):
    """What a killed preprocessing left is taken up or refused."""
    cache_dir = small_cache(folder, RANKS)

    def read(change):
        with replaced(cache_dir, change):
            (cache_dir / "index.json").unlink(missing_ok=True)
            small_cache(folder, RANKS)
            cache = EmbeddingCache(cache_dir)
            assert cache.get([0])["embeds"].eq(1).all()

    return contents(cache_dir, "*.safetensors"), read


# --------------------------------------------------------------------------------------------------------------- run folders


@target(quick=20, slow=1200)
def checkpoints(folder: Path):
    """`checkpoint.load` as in a run of one small parameter; where that lies in memory is the only thing that is not DeepSpeed's."""
    run, shapes = folder / "run", {"proj.weight": [4, 3]}
    newest = run / "checkpoints" / "iteration_000004"
    newest.mkdir(parents=True)
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    save_file({f"{kind}/proj.weight/{start}": torch.ones(6) for kind in kinds for start in (0, 6)}, newest / "shard_00000.safetensors")
    shard = newest / "shard_00000.safetensors"
    state = {"iteration": 4, "updates": 8, "dtype": "float32", "ema": True, "world_size": 1, "sp_size": 1, "zero_stage": 1}
    state |= {"files": {shard.name: {"size": shard.stat().st_size, "crc32": crc32(shard)}}, "parameters": shapes}
    (newest / "state.json").write_text(json.dumps(state | {"crc32": integrity.checksum(state)}))
    (run / "checkpoints" / "latest").write_text(newest.name)
    arguments = {
        "iterations": 10,
        "lora_rank": 0,
        "rewards": ["shapes", "clip=a/b"],
        "model": "m",
        "embeddings": "c",
        "learning_rate": 1e-4,
        "trackers": [],
    }
    (run / "manifest.json").write_text(json.dumps({"arguments": arguments, "embeddings_digest": "0", "sampling": {}, "history": []}))
    good_state, good_manifest = (newest / "state.json").read_bytes(), (run / "manifest.json").read_bytes()
    (run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "7", "since": "today"}))

    def with_right_checksums(name, data):
        """As malice has them."""
        if name.endswith(".safetensors"):
            right = state | {"files": {shard.name: {"size": len(data), "crc32": zlib.crc32(data)}}}
            (newest / "state.json").write_text(json.dumps(right | {"crc32": integrity.checksum(right)}))
        elif name.endswith("state.json"):
            with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
                changed = json.loads(data)
                data = json.dumps(changed | {"crc32": integrity.checksum(changed)}).encode()
        return name, data

    def read(change):
        name = change[0]
        if len(change[1]) % 2:
            change = with_right_checksums(*change)
        shards = {kind: [torch.zeros(12)] for kind in kinds}
        with pytest.MonkeyPatch.context() as patch, replaced(run, change):
            patch.setattr(checkpoint, "parameter_shapes", lambda engine: shapes)
            patch.setattr(checkpoint, "fragments", lambda engine: [[Fragment("proj.weight", 0, 0, 12)]])
            patch.setattr(checkpoint, "_trained", lambda engine, ema: shards)
            patch.setattr(checkpoint, "set_updates", lambda engine, updates: updates + 1)
            patch.setattr(checkpoint, "refresh_weights", lambda engine: None)
            patch.setattr(run_folder.shutil, "which", lambda program: program)  # SLURM is asked for another host's job
            patch.setattr(run_folder.subprocess, "run", lambda words, **options: SimpleNamespace(stdout="GONE " + "".join(words)))
            patch.setattr(run_folder, "_git_revision", lambda folder: None)
            patch.setattr(run_folder.atexit, "register", lambda leave: leavers.append(leave))
            leavers = []
            try:
                found = run_folder.enter(run, "auto", arguments, "0", False)
                assert found.parent == run / "checkpoints"
                iteration = checkpoint.load(SimpleNamespace(module=SimpleNamespace(dtype=torch.float32)), SimpleNamespace(), found)
                run_folder.write_manifest(run, str(run / "lock"), arguments, "0", {}, iteration, RANKS)
                assert iteration == 4 or name.endswith("state.json")
            finally:
                for leave in leavers:
                    leave()
                (run / "lock").unlink(missing_ok=True)  # an exception may still hold the file open
                (run / "lock").touch()
                (run / "manifest.json").write_bytes(good_manifest)
                (newest / "state.json").write_bytes(good_state)

    return contents(run, "checkpoints/latest", "checkpoints/*/*", "manifest.json", "lock"), read


@target(quick=20, slow=1200)
def metrics(folder: Path):
    """metrics.jsonl of a run that is resumed, and of one whose curves are drawn."""
    names = (
        "reward/shapes_mean",
        "held_out/clip_mean",
        "policy/ratio_max_dev",
        "policy/grad_norm",
        "reward/zero_std_frac",
        "reward/shapes_std",
        "held_out/clip_std",
    )
    manifest = {"arguments": {"keep_checkpoints": 2, "rewards": ["shapes"], "reward_weights": [1]}, "history": [], "from_iteration": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [json.dumps({"iteration": i + 1, **{name: i / 10 for name in names}}) + "\n" for i in range(40)]
    (folder / "metrics.jsonl").write_text("".join(lines))

    def read(change):
        with replaced(folder, change):
            tracking.Tracker(folder, [], {}, 40)
            rows = tracking.read_metrics(folder)
            guards.check(folder, 40, 1e-4)
            if len(change[1]) % 32 == 0:  # it takes most of the time
                tracking.plot_rewards(folder, folder / "rewards.png")
            assert all(isinstance(row, dict) for row in rows)

    return contents(folder, "metrics.jsonl"), read


@target(quick=10, slow=1000)
def manifests(folder: Path):
    """manifest.json and results as evaluation reads them."""
    (folder / "export").mkdir()
    sampling = {name: 2 for name in FAMILIES["sd"].sampling}
    (folder / "manifest.json").write_text(json.dumps({"arguments": {}, "sampling": sampling}))
    args = evaluate.Args(folder, folder, prompts=folder, rewards=("shapes",), checkpoints=(str(folder / "export"),))
    pipeline = type("StableDiffusionPipeline", (), {"vae": SimpleNamespace(config=SimpleNamespace(sample_size=32))})()

    def read(change):
        with replaced(folder, change):
            settings = evaluate.sampling_settings(args, pipeline)
            evaluate.check_numbers(settings, {"above 0": " ".join(settings)})

    return contents(folder, "manifest.json"), read


# ------------------------------------------------------------------------------------------------------------ model folders


def model_target(family: str, parts: dict[str, str]) -> Target:
    """parts: subfolder -> class, of what the training script loads."""

    def make(folder: Path):
        import diffusers

        model = folder / "model"
        for part in parts:
            shutil.copytree(MODELS / family / part, model / part)

        def read(change):
            with replaced(model, change):
                part = change[0].split("/")[0]
                pretrained.load_pretrained(getattr(diffusers, parts[part]), model, part)

        return contents(model, "*/*"), read

    make.__name__ = f"{family}_networks"
    return make


target(quick=3, slow=120)(model_target("flux", {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}))
target(quick=0, slow=60)(model_target("hunyuan", {"transformer": "HunyuanVideoTransformer3DModel", "vae": "AutoencoderKLHunyuanVideo"}))
target(quick=0, slow=60)(model_target("wan", {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}))


@target(quick=0, slow=60)
def pipelines(folder: Path):
    """A whole folder, as evaluation and make_reference_images.py load it, and its scheduler as evaluation changes it."""
    model = folder / "model"
    shutil.copytree(MODELS / "sd", model)

    def read(change):
        with replaced(model, change):
            pipeline = pretrained.load_pipeline(model, "auto", CPU)
            evaluate.use_trained_sampler(pipeline, {"sampling_steps": 2})

    return contents(model, "model_index.json", "*/*.json", "tokenizer/*"), read


@target(quick=0, slow=60)
def flow_pipelines(folder: Path):
    model = folder / "model"
    shutil.copytree(MODELS / "flux", model)

    def read(change):
        with replaced(model, change):
            pipeline = pretrained.load_pipeline(model, "auto", CPU)
            evaluate.use_trained_sampler(pipeline, {"sampling_steps": 2, "shift": 3.0})

    return contents(model, "model_index.json", "scheduler/*", "tokenizer_2/*"), read


@target(quick=10, slow=1000)
def tokenizers(folder: Path):
    """As the embedding scripts load them."""
    from diffusers import FluxPipeline

    model = folder / "model"
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MODELS / "flux" / part, model / part)
    shutil.copy(MODELS / "flux" / "model_index.json", model)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "transformer", "vae"))

    def read(change):
        with replaced(model, change):
            pipeline = encoders.load_encoders(FluxPipeline, str(model), **absent)
            report = {"lines": [1], "empty": [], "duplicates": []}
            encoders.report_prompts([{"prompt": "a red circle"}], report, lambda p: pipeline.tokenizer_2(p).input_ids, 512, RANKS)
            encoders.report_prompts([{"prompt": "a red circle"}], report, lambda p: pipeline.tokenizer(p).input_ids, 77, RANKS)

    return contents(model, "model_index.json", "tokenizer*/*", "scheduler/*"), read


# ------------------------------------------------------------------------------------------------------------------- rewards


def try_reward(spec: str, shape: tuple[int, ...] = (1, 3, 32, 32)) -> None:
    rewards = load_rewards(parse_rewards([spec]), CPU)
    score(rewards, torch.zeros(shape), [{"prompt": "a red circle"}] * shape[0])


@target(quick=3, slow=80)
def clip_folders(folder: Path):
    shutil.copytree(MODELS / "clip", folder / "clip")

    def read(change):
        with replaced(folder / "clip", change):
            try_reward(f"clip={folder / 'clip'}")

    return contents(folder / "clip", "*"), read


@target(quick=0, slow=60)
def open_clip_folders(folder: Path):
    torch.save(make_hps.random_weights(make_hps.DFN, seed=2), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": make_hps.DFN, "preprocess_cfg": make_hps.PREPROCESSING["squash"]}
    (folder / "open_clip_config.json").write_text(json.dumps(config))

    def read(change):
        with replaced(folder, change):
            try_reward(f"clip={folder}")

    return contents(folder, "*.json"), read


@target(quick=0, slow=30)
def hps_files(folder: Path):
    make_hps.save_hps(folder / "hps.pt")

    def read(change):
        with replaced(folder, change):
            try_reward(f"hpsv2={folder / 'hps.pt'}")

    return contents(folder, "hps.pt"), read


def videoalign_target(layout: str) -> Target:
    def make(folder: Path):
        write_videoalign(folder / "videoalign", layout)

        def read(change):
            with replaced(folder / "videoalign", change):
                try_reward(f"videoalign.vq={folder / 'videoalign'}", (1, 3, 4, 56, 56))

        return contents(folder / "videoalign", "*.json", "*/*.json", "*/*.pth", "*/*.safetensors"), read

    make.__name__ = f"videoalign_{layout}"
    return make


target(quick=0, slow=60)(videoalign_target("full"))
target(quick=0, slow=60)(videoalign_target("adapter"))


@target(quick=5, slow=400)
def reference_images_of_rewards(folder: Path):
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    Image.new("RGB", (32, 32)).save(folder / "a.jpg")
    rewards = load_rewards(parse_rewards(["fidelity"]), CPU)

    def read(change):
        with replaced(folder, change):
            score(rewards, torch.zeros(1, 3, 2, 32, 32), [{"prompt": "a red circle", "image": str(folder / change[0])}])

    return contents(folder, "*"), read


# --------------------------------------------------------------------------------------------------------------------- flags

WORDS = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "4",
    "12",
    "True",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "1e30",
    "0.5",
    "1_000",
    "٣",
    "½",
]
WORDS += [
    "\0",
    "\ud800",
    "é",
    "x" * 3000,
    "9" * 5000,
    "1" + "0" * 30,
    "-9223372036854775809",
    "18446744073709551616",
    "1,2",
    "[1]",
    "{}",
    "None",
]
WORDS += [
    "/etc/passwd",
    "/",
    "..",
    "a\nb",
    "%s",
    "*",
    "never",
    "first",
    "auto",
    "bfloat16",
    "wandb",
    "0x10",
    "1e3",
    "2.0",
    "shapes",
    "clip=x@0.5",
]
SPECS = [
    "shapes",
    "clip=a/b@0.3",
    "clip.two=a,dtype=float32",
    "videoalign.vq=x,fps=4@1",
    "ocr,frames=2",
    "http=http://h:1+http://h:2,batch=3",
]


@target(quick=30, slow=2000)
def reward_specs(folder: Path):
    words = st.builds(lambda text, seed: changed_bytes(Random(seed), text.encode()), st.sampled_from(SPECS), st.integers(0, 2**24 - 1))
    spec = words.map(lambda word: word.decode("utf-8", "surrogateescape")) | st.text(max_size=30) | st.sampled_from(SPECS)
    return st.lists(spec, max_size=3), parse_rewards


def words_for(annotation: object) -> st.SearchStrategy[list[str]]:
    """Values of a flag: mostly what it may hold, out of range or not, and now and then anything."""
    numbers = st.integers() | st.sampled_from([0, 1, 2, 3, 4, 12, 10**9, 2**63, 10**30, -(10**400)])
    if "float" in str(annotation):
        numbers |= st.floats() | st.sampled_from([1e-320, 1e-13, 1e308])
    plausible = numbers.map(str) if "int" in str(annotation) or "float" in str(annotation) else st.sampled_from([*WORDS, *SPECS])
    return st.lists(plausible, min_size=1, max_size=2) | st.lists(plausible | st.sampled_from(WORDS) | st.text(max_size=8), max_size=3)


def args_target(script: str, needed: str) -> Target:
    """The flags of a script, as the command line gives them."""

    def make(folder: Path):
        module = importlib.import_module(script)
        types = {name: field.type for name, field in module.Args.__dataclass_fields__.items()}
        flag = st.sampled_from(sorted(types)).flatmap(lambda name: st.tuples(st.just(f"--{name}"), words_for(types[name])))
        flag |= st.tuples(st.sampled_from(["--", "--nope", "-h1", "--model.x", "--no-model", "--model=1"]), st.just([]))

        def read(flags):
            words = needed.split() + [word for name, values in flags for word in (name, *values)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    args = tyro.cli(module.Args, args=words, use_underscores=True)
                except SystemExit as end:
                    assert end.code in (0, 2) and "Traceback" not in said.getvalue()
                    raise UserError("tyro said what is wrong") from None
            json.dumps({name: str(getattr(args, name)) for name in types}).encode()
            timedelta(minutes=getattr(args, "timeout_minutes", 1))

        return st.lists(flag, min_size=1, max_size=3), read

    make.__name__ = f"args_of_{script}"
    return make


for family in FAMILIES:
    needed_flags = "--model m --embeddings e --output_dir o --rewards shapes"
    target(quick=10 if family == "flux" else 2, slow=600 if family == "flux" else 100)(args_target(f"train_grpo_{family}", needed_flags))
    target(quick=2, slow=60)(args_target(f"embed_{family}", "--model m --prompts p.jsonl --output_dir o"))
target(quick=5, slow=300)(args_target("evaluate", "--model m --prompts p --output_dir o --rewards shapes"))
target(quick=2, slow=100)(args_target("make_reference_images", "--model m --prompts p --output_dir o --height 16 --width 16"))
target(quick=2, slow=100)(args_target("split_prompts", "--inputs p.txt --output_dir o"))


# --------------------------------------------------------------------------------------------------------------- the harness


class Hang(BaseException):
    """Not an Exception: nothing that is tested may take it for a broken file."""


class Watcher:
    """Sees, through Python's audit events, what the process does while an input is read: all that is not to be is noted."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")
    PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.getaddrinfo", "builtins.input")

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if (arguments[2] or 0) & self.WRITES and not self.allowed(path):
                self.seen.append(f"wrote {path}")
            if "secret" in path:
                self.seen.append(f"opened {path}")
        elif event in self.CHANGES:
            paths = [path for path in arguments[:2] if isinstance(path, str | os.PathLike)]
            if arguments[-1] in (-1, None) or isinstance(arguments[-1], str):  # else it counts from an open folder: shutil.rmtree
                self.seen += [f"{event} {path}" for path in paths if not self.allowed(os.path.abspath(path))]
        elif event in self.PROGRAMS:
            self.seen.append(f"{event} {arguments}")
        elif event == "pickle.find_class" and arguments[0].split(".")[0] not in ("fastvideo", "pathlib"):  # sent between processes
            self.seen.append(f"unpickled {'.'.join(arguments)}")

    def allowed(self, path: str) -> bool:
        return f"{path}/".startswith((f"{self.folder}/", "/dev/null")) or "__pycache__" in path


WATCHER = Watcher()
RANKS = Ranks(0, 1, CPU)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    matplotlib.get_cachedir()  # makes its folders
    init()
    yield
    dist.destroy_process_group()


def attempt(name: str, read: Read, given_input: object, folder: Path) -> bool:
    """Read one input, which must end well (True) or in one sentence (False), in time, and without anything that `WATCHER` sees."""

    def too_long(number, frame):
        raise Hang(f"no end within {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    WATCHER.folder, WATCHER.seen, good = folder, [], True
    try:
        read(given_input)
    except UserError as error:
        good = False
        assert str(error).strip() and "\n" not in str(error), f"not one sentence: {error}"
    finally:
        WATCHER.folder = None
        signal.alarm(0)
    assert not WATCHER.seen
    (ACCEPTED if good else REFUSED)[name].add(hash(repr(given_input)))
    return good


WHOLE = [b"", b"\0", b"\xff", b"null", b"[1]", b'"x"', b"{}", b"{}\n", b"[" * 100_000, b'{"prompt":' * 50_000 + b"\n", b"Infinity"]


def fuzz(name: str, count: int, folder: Path, sweep: bool = False) -> None:
    """`count` inputs, and those in FOUND; with `sweep` also each file with each of WHOLE in its place."""
    make, *_ = TARGETS[name]
    folder.mkdir()
    inputs, read = make(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, before[1]))
    try:
        if isinstance(inputs, dict):
            for file in inputs.items():
                assert attempt(name, read, file, folder), f"{file[0]} is good"
            for data in WHOLE if sweep else ():
                for path in inputs:
                    attempt(name, read, (path, data), folder)
            inputs = changed_files(inputs)

        phases = [Phase.explicit, Phase.generate]  # what fails is shown as it is
        quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

        @settings(max_examples=count, derandomize=True, phases=phases, **quiet)
        @given(inputs)
        def run(one: object) -> None:
            attempt(name, read, one, folder)

        for one in FOUND.get(name, []):
            run = example(one)(run)
        run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was written outside of the folder"


# What was once not refused in one sentence.
DEEP = b"[" * 100_000
FOUND: dict[str, list] = {
    "prompt_files": [("p.jsonl", DEEP)],
    "prompt_lists": [("p.jsonl", DEEP), ("p.json", DEEP)],
    "manifests": [("manifest.json", data) for data in (b"", b"[1]", b'{"sampling": 1}', b"\xff", DEEP, b"9" * 5000)],
    "made_images": [("settings.json", b"1"), ("settings.json", DEEP)],
    "metrics": [("metrics.jsonl", data + b"\n") for data in (b"1", b"\xff", DEEP, b'{"iteration": 1, "reward/a_mean": "x"}')],
    "checkpoints": [
        ("checkpoints/iteration_000004/state.json", b'{"updates": 8}'),
        ("checkpoints/iteration_000004/state.json", b'"$HOME"'),
        ("manifest.json", b'{"arguments": {"rewards": 0, "model": 1}}'),
        ("manifest.json", b'{"arguments": {}, "embeddings_digest": "1"}'),
        ("manifest.json", b'{"arguments": {}, "history": [1]}'),
        ("checkpoints/latest", b"../../secret"),
    ],
    "tokenizers": [
        (
            "tokenizer_2/tokenizer_config.json",
            b'{"tokenizer_class": "T5Tokenizer", "extra_ids": 9223372036854775808}',
        ),  # all made, one by one
        ("scheduler/scheduler_config.json", b"Infinity"),  # was looked for on the hub
        ("tokenizer/tokenizer_config.json", b'""'),
        ("tokenizer_2/tokenizer.json", b"1"),
    ],
    "pipelines": [
        ("scheduler/scheduler_config.json", b'"x"'),
        ("model_index.json", b'{"_class_name": " StableDiffusionPipeline", "_diffusers_version": "0.42.1"}'),
        ("tokenizer/tokenizer.json", b"1"),
    ],
    "args_of_train_grpo_flux": [
        [("--iterations", ["1" + "0" * 400])],
        [("--noise_level", ["1e200"])],
        [("--sampling_steps", [str(10**13)])],
    ],
}


@pytest.mark.parametrize("name", [name for name, (_, quick, _) in TARGETS.items() if quick])
def test_fuzz(name, tmp_path):
    fuzz(name, TARGETS[name][1], tmp_path / "given")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_long(name, tmp_path):
    fuzz(name, TARGETS[name][2], tmp_path / "given", sweep=True)


@pytest.mark.slow
def test_fuzz_long_was_long(capsys):
    """Runs last: over 10,000 different inputs were refused."""
    seen = REFUSED.keys() | ACCEPTED.keys()
    if seen != TARGETS.keys():
        pytest.skip("not all targets were tried in this process")
    refused, accepted = (sum(map(len, counter.values())) for counter in (REFUSED, ACCEPTED))
    with capsys.disabled():
        print(f"\n{refused} bad inputs refused, {accepted} harmless ones read")
    assert refused >= 10_000


# ---------------------------------------------------------------------------------------------------------- the whole scripts


def resumed(file: str, data: bytes) -> Callable:
    """Flags of a run that goes on in a copy of a finished one, in which a file is broken."""

    def flags(folder: Path, run_flags: Callable, finished_run: Path) -> tuple:
        shutil.copytree(finished_run, folder / "run")
        (folder / "run" / file).write_bytes(data)
        return TRAIN, *run_flags(folder / "run", {"--iterations": 8})

    return flags


def evaluated(file: str, data: bytes) -> Callable:
    """Flags of an evaluation of such a copy, or, for MODEL/FILE, of a broken base model."""

    def flags(folder: Path, run_flags: Callable, finished_run: Path) -> tuple:
        shutil.copytree(finished_run, folder / "run")
        shutil.copytree(MODELS / "flux", folder / "model")
        (folder / "prompts.txt").write_text("a red circle\n")
        (folder / file).write_bytes(data)
        rewards = {"--rewards": "aesthetic", "--num_seeds": 1, "--checkpoints": folder / "run" / "export", "--output_dir": folder / "out"}
        return EVALUATE, {"--model": folder / "model", "--prompts": folder / "prompts.txt", **rewards}

    return flags


def embedded(family: str, file: str, data: bytes) -> Callable:
    """Flags of an embedding script with a broken model folder or prompt file."""

    def flags(folder: Path, run_flags: Callable, finished_run: Path) -> tuple:
        shutil.copytree(MODELS / family, folder / "model")
        (folder / "prompts.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n')
        Image.new("RGB", (32, 32)).save(folder / "a.png")
        (folder / file).write_bytes(data)
        size = {"--height": 32, "--width": 32} if family == "skyreels" else {}
        paths = {"--model": folder / "model", "--prompts": folder / "prompts.jsonl", "--output_dir": folder / "out"}
        return REPOSITORY / "preprocess" / f"embed_{family}.py", paths | size

    return flags


BROKEN = {
    "latest": resumed("checkpoints/latest", b"../../secret"),
    "state of another type": resumed("checkpoints/iteration_000006/state.json", b"[]"),
    "shard cut off": resumed("checkpoints/iteration_000006/shard_00000.safetensors", b"\xff" * 9),
    "manifest cut off": resumed("manifest.json", b'{"arguments": {'),
    "manifest of numbers": resumed("manifest.json", b'{"arguments": {"model": 1, "rewards": 2}}'),
    "metrics of strings": resumed("metrics.jsonl", b'{"iteration": "1"}\n{"iteration": 2}\n'),
    "metrics nested deeply": resumed("metrics.jsonl", DEEP + b"\n"),
    "evaluation, manifest without settings": evaluated("run/manifest.json", b"{}"),
    "evaluation, no weights": evaluated("run/export/transformer/diffusion_pytorch_model.safetensors", b""),
    "evaluation, tokenizer": evaluated("model/tokenizer/tokenizer.json", b"1"),
    "evaluation, scheduler": evaluated("model/scheduler/scheduler_config.json", b"Infinity"),
    "evaluation, index of the model": evaluated("model/model_index.json", b"null"),
    "evaluation, prompts": evaluated("prompts.txt", b"\xff\xfe\n"),
    "embedding, tokenizer": embedded("flux", "model/tokenizer_2/tokenizer.json", b'{"model": {}}'),
    "embedding, settings of the tokenizer": embedded("sd", "model/tokenizer/tokenizer_config.json", b'""'),
    "embedding, encoder": embedded(
        "wan", "model/text_encoder/config.json", b'{"num_layers": 100000000, "architectures": ["UMT5EncoderModel"]}'
    ),
    "embedding, prompts": embedded("sd", "prompts.jsonl", b'{"prompt": 1}\n'),
    "embedding, prompts nested deeply": embedded("sd", "prompts.jsonl", DEEP),
    "embedding, picture": embedded("skyreels", "a.png", b"\x89PNG\r\n\x1a\n"),
    "embedding, PostScript": embedded("skyreels", "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_scripts_end_in_one_sentence(what, run_flags, finished_run, tmp_path):
    script, *flags = BROKEN[what](tmp_path, run_flags, finished_run)
    result = run_script(script, *flags, log=tmp_path / "log")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1, result.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------------------ malice, by name


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(kind: str, path: Path, victim: Path) -> None:
    """A file that makes `victim` when it is unpickled: as torch saves now, as it saved once, and as pickle does."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Malice(victim)}))
    else:
        torch.save({"state_dict": Malice(victim)}, path, _use_new_zipfile_serialization=kind == "torch")


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_nothing_is_unpickled(kind, tmp_path):
    victim, model = tmp_path / "victim", tmp_path / "model"
    shutil.copytree(MODELS / "sd", model)
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
        pickled(kind, model / part / name, victim)
    pickled(kind, tmp_path / "HPS.pt", victim)
    (tmp_path / "open").mkdir()
    pickled(kind, tmp_path / "open" / "open_clip_pytorch_model.bin", victim)
    (tmp_path / "open" / "open_clip_config.json").write_text(json.dumps({"model_cfg": make_hps.DFN}))
    write_videoalign(tmp_path / "videoalign")
    pickled(kind, next((tmp_path / "videoalign").glob("*/model.pth")), victim)
    shutil.copytree(MODELS / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    pickled(kind, tmp_path / "clip" / "pytorch_model.bin", victim)
    reads = [lambda: pretrained.load_pretrained(diffusers.UNet2DConditionModel, model, "unet")]
    reads += [lambda: pretrained.load_pretrained(transformers.CLIPTextModel, model, "text_encoder")]
    reads += [lambda: pretrained.load_pipeline(model, "auto", CPU)]
    specs = (f"hpsv2={tmp_path}/HPS.pt", f"clip={tmp_path}/open", f"videoalign.vq={tmp_path}/videoalign", f"clip={tmp_path}/clip")
    reads += [lambda spec=spec: load_rewards(parse_rewards([spec]), CPU) for spec in specs]
    for read in reads:
        with pytest.raises(UserError):
            read()
        assert not victim.exists()


@pytest.mark.parametrize(
    ("family", "part", "setting"),
    [
        ("flux", "transformer", {"num_layers": 10**7}),
        ("flux", "vae", {"block_out_channels": [10**6] * 3}),
        ("flux", "text_encoder", {"intermediate_size": 10**7}),
        ("wan", "transformer", {"rope_max_seq_len": 10**7}),
    ],
    ids=str,
)
def test_claims_of_a_config_are_not_built(family, part, setting, tmp_path):
    shutil.copytree(MODELS / family / part, tmp_path / part)
    path = tmp_path / part / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | setting))
    library, name = (diffusers, config["_class_name"]) if "_class_name" in config else (transformers, config["architectures"][0])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=r"its config\.json (has|describes)"):
        pretrained.load_pretrained(getattr(library, name), tmp_path, part)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"
    assert time.monotonic() - start < 10


def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path):
    folder, outside = tmp_path / "iteration_000001", tmp_path / "shard_00000.safetensors"
    folder.mkdir()
    save_file({"weight/a/0": torch.ones(1)}, outside)
    for name in ("../shard_00000.safetensors", str(outside), "../iteration_000001/../shard_00000.safetensors"):
        state = {"iteration": 1, "updates": 1, "dtype": "float32", "ema": False, "parameters": {}}
        state |= {"files": {name: {"size": outside.stat().st_size, "crc32": crc32(outside)}}}
        (folder / "state.json").write_text(json.dumps(state | {"crc32": integrity.checksum(state)}))
        with pytest.raises(UserError, match="it names the file"):
            integrity.verify(folder)


def test_a_picture_that_claims_to_be_huge(tmp_path):
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(UserError, match="exceeds limit"):
        encoders.read_image(str(tmp_path / "bomb.png"))


def test_a_picture_in_postscript_runs_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    WATCHER.folder, WATCHER.seen = tmp_path, []
    with pytest.raises(UserError, match="cannot identify image file"):
        encoders.read_image(str(tmp_path / "x.png"))
    WATCHER.folder = None
    assert not WATCHER.seen
