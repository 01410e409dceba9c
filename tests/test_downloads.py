"""The `hf download` commands of the documentation, through huggingface_hub's own parser: what they fetch is what is needed, and no more."""

import re
import shlex
import shutil
import subprocess

import diffusers
import pytest
import torch
from click.testing import CliRunner
from conftest import REPOSITORY
from huggingface_hub.utils import filter_repo_objects
from test_full_scale import text_encoders

from fastvideo.models.families import FAMILIES
from fastvideo.models.model_folder import check_model

TEXTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), *sorted((REPOSITORY / "scripts").glob("*.sh"))]


def shards(stem: str, number: int) -> list[str]:
    return [f"{stem}.safetensors.index.json", *(f"{stem}-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1))]


def parts(folder: str, *names: str) -> set[str]:
    return {f"{folder}/{name}" for name in names}


CLIP_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
OF_ALL = {"model_index.json"} | parts("scheduler", "scheduler_config.json")
OF_HUNYUAN = (
    OF_ALL
    | parts("text_encoder", "config.json", *shards("model", 4))
    | parts("text_encoder_2", "config.json", "model.safetensors")
    | parts("tokenizer", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    | parts("tokenizer_2", *CLIP_TOKENIZER)
    | parts("vae", "config.json", "diffusion_pytorch_model.safetensors")
)
CLIP_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", *CLIP_TOKENIZER}
# Repository -> (what is needed of it, what else is in it), as far as known: no listing of them was at hand.
REPOSITORIES = {
    "CompVis/stable-diffusion-v1-4": (
        OF_ALL
        | parts("unet", "config.json", "diffusion_pytorch_model.safetensors")
        | parts("vae", "config.json", "diffusion_pytorch_model.safetensors")
        | parts("text_encoder", "config.json", "model.safetensors")
        | parts("tokenizer", *CLIP_TOKENIZER),
        parts(
            "unet", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"
        )
        | parts("safety_checker", "model.safetensors", "pytorch_model.bin")
        | parts("text_encoder", "model.fp16.safetensors", "pytorch_model.bin"),
    ),
    "black-forest-labs/FLUX.1-dev": (
        OF_ALL
        | parts("transformer", "config.json", *shards("diffusion_pytorch_model", 3))
        | parts("text_encoder", "config.json", "model.safetensors")
        | parts("text_encoder_2", "config.json", *shards("model", 2))
        | parts("tokenizer", *CLIP_TOKENIZER)
        | parts("tokenizer_2", "spiece.model", "tokenizer.json", "tokenizer_config.json")
        | parts("vae", "config.json", "diffusion_pytorch_model.safetensors"),
        {"flux1-dev.safetensors", "ae.safetensors"},
    ),
    "hunyuanvideo-community/HunyuanVideo": (
        OF_HUNYUAN | parts("transformer", "config.json", *shards("diffusion_pytorch_model", 6)),
        set(),
    ),
    "Skywork/SkyReels-V1-Hunyuan-I2V": ({"config.json", *shards("diffusion_pytorch_model", 6)}, {"README.md", "assets/demo.mp4"}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        OF_ALL
        | parts("transformer", "config.json", *shards("diffusion_pytorch_model", 2))
        | parts("text_encoder", "config.json", *shards("model", 5))
        | parts("tokenizer", "spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        | parts("vae", "config.json", "diffusion_pytorch_model.safetensors"),
        set(),
    ),
    "xswu/HPSv2": ({"HPS_v2.1_compressed.pt"}, {"HPS_v2_compressed.pt"}),
    "apple/DFN5B-CLIP-ViT-H-14-378": (
        {"open_clip_config.json", "open_clip_pytorch_model.bin"},
        {"pytorch_model.bin"},
    ),
    "openai/clip-vit-large-patch14": (CLIP_FILES, {"flax_model.msgpack", "tf_model.h5", "pytorch_model.bin"}),
    "yuvalkirstain/PickScore_v1": (CLIP_FILES, {"pytorch_model.bin"}),
    "KwaiVGI/VideoReward": ({"model_config.json", "checkpoint-11352/model.pth"}, set()),
    "Qwen/Qwen2-VL-2B-Instruct": (
        {"config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"},
        set(shards("model", 2)[1:]),
    ),
    "MizzenAI/HPSv3": ({"HPSv3.safetensors"}, set()),
    "Qwen/Qwen2-VL-7B-Instruct": ({"config.json", *shards("model", 5)}, set()),
}

DATA_SETS = {  # likewise
    "ymhao/HPDv2": ({"train.json"}, {"train.tar.gz", "test.json", "test.tar.gz"}),
    "zhwang/HPDv2": (
        parts("benchmark", "anime.json", "concept-art.json", "paintings.json", "photo.json"),
        {"benchmark/benchmark_imgs/CM.tar.gz", "test.tar.gz"},
    ),
    "WenhaoWang/VidProM": ({"VidProM_unique.csv"}, {"example/example.tar.gz"}),
    "BestWishYsh/ConsisID-preview-Data": ({"video_caption_train.json"}, {"videos/1.tar.gz"}),
}
REPOSITORIES |= DATA_SETS
REPOSITORIES |= {  # judges of benchmarks
    "facebook/mask2former-swin-small-coco-instance": (
        {"config.json", "preprocessor_config.json", "model.safetensors"},
        {"pytorch_model.bin"},
    ),
    "THUDM/VisionReward-Video": ({"config.json"}, set()),
}


def commands() -> list[tuple[str, list[str]]]:
    """Every `hf download` of the texts: where it stands, and its words."""
    found = []
    for path in TEXTS:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|\s)hf (download .*)", line):
                found.append((path.name, shlex.split(match[1].replace("`", ""), comments=True)))
    return found


def fetched(words: list[str], monkeypatch) -> tuple[str, set[str]]:
    """Repository, and the files of `REPOSITORIES` that the command would fetch from it."""
    from huggingface_hub.cli import download, hf

    asked = {}

    def note(**options):
        asked.update(options)
        return "nowhere"

    monkeypatch.setattr(download, "hf_hub_download", note)
    monkeypatch.setattr(download, "snapshot_download", note)
    app = hf.app
    if not hasattr(app, "main"):
        import typer

        app = typer.main.get_command(app)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    files = set().union(*REPOSITORIES[asked["repo_id"]])
    kind = getattr(asked["repo_type"], "value", asked["repo_type"])
    assert (kind == "dataset") == (asked["repo_id"] in DATA_SETS), words
    if "filename" in asked:
        return asked["repo_id"], {asked["filename"]}
    return asked["repo_id"], set(
        filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )


def test_the_documented_downloads_fetch_what_is_needed(monkeypatch):
    found = commands()
    assert {words[1] for _, words in found} == REPOSITORIES.keys()
    for place, words in found:
        repository, files = fetched(words, monkeypatch)
        needed, rest = REPOSITORIES[repository]
        if "transformer/*" in words:  # what SkyReels takes of HunyuanVideo
            needed, rest = OF_HUNYUAN, needed - OF_HUNYUAN
        assert needed <= files, (place, words, needed - files)
        assert not {name for name in files & rest if name.endswith((".bin", ".safetensors", ".h5", ".msgpack", ".pt", ".tar.gz"))}, (
            place,
            words,
        )


def test_two_patterns_behind_one_option_are_noticed(monkeypatch):
    """As this page once had it: the second pattern becomes a file name, and cancels the option."""
    _, files = fetched(shlex.split('download yuvalkirstain/PickScore_v1 --include "*.json" "*.safetensors"'), monkeypatch)
    assert not files >= CLIP_FILES


def test_skyreels_folder_is_made_by_the_documented_commands(tmp_path):
    text = (REPOSITORY / "docs" / "models.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("sed -i"))
    model = tmp_path / "models" / "SkyReels-V1-I2V"
    shutil.copytree(REPOSITORY / "shapes/models/hunyuan", model, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(REPOSITORY / "shapes/models/skyreels/transformer", model / "transformer")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    check_model(model, "skyreels")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_sizes_in_the_table(family):
    with torch.device("meta"):
        vae = getattr(diffusers, family.vae.class_name)(**family.vae.published)
    parameters = family.parameters + text_encoders(family) + sum(weight.numel() for weight in vae.parameters())
    lines = (REPOSITORY / "docs" / "models.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| [{family.title}]")]
    *_, network, half, full, _ = (cell.strip() for cell in line.split("|"))
    assert network == f"{family.parameters / 1e9:.2f} billion"
    assert (half, full) == (f"{2 * parameters / 1e9:.1f} GB", f"{4 * parameters / 1e9:.1f} GB")
