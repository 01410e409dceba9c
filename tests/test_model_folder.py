"""A wrong model folder ends in one sentence that says what is wrong, before any weights are read, in check_model.py and in every script."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import EVALUATE, REPOSITORY, run_script, tiny_model
from safetensors.torch import load_file, save_file

from evaluate import use_trained_sampler
from fastvideo.errors import UserError
from fastvideo.models.families import FAMILIES
from fastvideo.models.model_folder import check_model
from train_grpo_flux import time_schedule

MODELS = REPOSITORY / "shapes" / "models"
CHECK = REPOSITORY / "preprocess" / "check_model.py"


@pytest.fixture
def copy(tmp_path):
    """Function that copies a family's folder, to be spoilt."""
    return lambda family: Path(shutil.copytree(MODELS / family, tmp_path / family))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_shards(folder: Path, stem: str) -> list[Path]:
    """Split a file of weights in two, as published ones are."""
    tensors = load_file(folder / f"{stem}.safetensors")
    files, names = [folder / f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)], sorted(tensors)
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, file)
    places = {name: files[i % 2].name for i, name in enumerate(names)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / f"{stem}.safetensors").unlink()
    return files


def sentence(folder: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        check_model(folder, *arguments)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_folders_pass(family):
    model = tiny_model(family)
    sizes = check_model(model, family)
    assert check_model(model) == sizes
    for part, size in sizes.items():
        assert size == sum(path.stat().st_size for path in (model / part).glob("*.safetensors"))


def test_published_layouts_pass(copy):
    """Shards; T5 with its shared weight alone; Stable Diffusion's old names in the VAE; .bin files and variants beside the weights."""
    flux, sd = copy("flux"), copy("sd")
    in_shards(flux / "transformer", "diffusion_pytorch_model")
    in_shards(flux / "text_encoder_2", "model")
    assert not any("embed_tokens" in name for file in (flux / "text_encoder_2").glob("*.safetensors") for name in load_file(file))
    (flux / "flux1-dev.safetensors").write_bytes(b"")
    check_model(flux)
    vae = sd / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(vae).items():
        for part, before in new.items():
            name = name.replace(part, before) if "mid_block.attentions" in name else name
        old[name] = tensor
    save_file(old, vae)
    (sd / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (sd / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    change(sd / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True)
    check_model(sd)


def test_files_that_are_missing_or_cut_off(copy):
    model = copy("flux")
    network = model / "transformer"
    _, second = in_shards(network, "diffusion_pytorch_model")
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert f"{second.name} has {len(whole) - 100} bytes, not the {len(whole)} of its tensors" in sentence(model)
    second.write_bytes(whole[:60])
    assert "cut off at 60 bytes" in sentence(model)
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9983040304\n")
    assert "pointer of Git LFS" in sentence(model)
    second.unlink()
    assert f"{second.name}, named in diffusion_pytorch_model.safetensors.index.json, is missing (1 of 2 files are)" in sentence(model)
    for path in network.glob("*.safetensors*"):
        path.unlink()
    (network / "flax_model.msgpack").write_bytes(b"")
    assert "has no diffusion_pytorch_model.safetensors, only flax_model.msgpack" in sentence(model)
    shutil.rmtree(network)
    assert sentence(model) == f"--model: there is no folder {network}: download the folder again"
    unfinished = model / ".cache" / "huggingface" / "download" / "transformer" / "x.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    assert "interrupted: give the same hf download command again" in sentence(model)


@pytest.mark.parametrize("use", ["embedding", "evaluation"])
def test_a_tokenizer_that_is_missing_broken_or_of_another_encoder(copy, use):
    model = copy("hunyuan")
    file = model / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    others = {  # more tokens than LLaMA has, and far fewer
        "knows 574 tokens, but {}/text_encoder has 505": "hunyuan/tokenizer_2",
        "knows 124 tokens, but {}/text_encoder has 505": "wan/tokenizer",
    }
    for said, other in others.items():
        shutil.copytree(MODELS / other, file.parent, dirs_exist_ok=True)
        assert said.format(model) in sentence(model, "hunyuan", use)
    shutil.copytree(MODELS / "hunyuan" / "tokenizer", file.parent, dirs_exist_ok=True)
    check_model(model, "hunyuan", use)
    file.write_text(whole[:1000])
    assert f"{file.parent} is no tokenizer that works (tokenizer.json, tokenizer_config.json): " in sentence(model, "hunyuan", use)
    file.unlink()
    assert f"{file.parent} has no tokenizer.json, and what it has" in sentence(model, "hunyuan", use)
    assert sentence(model, "hunyuan", use).endswith("download the folder again")
    shutil.rmtree(file.parent)
    file.parent.mkdir()
    assert sentence(model, "hunyuan", use) == f"--model: {file.parent} is empty: download the folder again"
    check_model(model, "hunyuan", "training")


def test_flux_with_its_second_tokenizer_twice(copy):
    model = copy("flux")
    shutil.copytree(model / "tokenizer_2", model / "tokenizer", dirs_exist_ok=True)
    assert f"{model}/tokenizer knows 119 tokens, but {model}/text_encoder has 574: it is another encoder's" in sentence(model)


def test_weights_are_compared_with_the_config(copy):
    model = copy("hunyuan")
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = model / part / f"{stem}.safetensors"
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        assert f"weights in {file.parent} do not fit its config: missing keys" in sentence(model)
        save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
        assert f"weights in {file.parent} do not fit its config: mismatched keys" in sentence(model)
        save_file(tensors | {"another.weight": tensors[name].clone()}, file)
        assert f"weights in {file.parent} do not fit its config: unexpected keys another.weight" in sentence(model)
        save_file(tensors, file)
    check_model(model)


@pytest.mark.parametrize(
    ("family", "setting", "named"),
    [
        ("wan", {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}, "transformer_2"),
        ("wan", {"boundary_ratio": 0.875}, "boundary_ratio 0.875"),
        ("wan", {"expand_timesteps": True}, "expand_timesteps true"),  # Wan 2.2 5B: a time for each token
        ("flux", {"controlnet": ["diffusers", "FluxControlNetModel"]}, "controlnet"),
    ],
)
def test_what_a_pipeline_would_use_and_training_not(copy, family, setting, named):
    model = copy(family)
    change(model / "model_index.json", **setting)
    message = sentence(model)
    assert named in message
    assert "training does not support" in message
    for use in ("training", "embedding", "evaluation"):
        assert sentence(model, family, use) == message


@pytest.mark.parametrize(
    ("family", "inputs", "said"),
    [
        ("flux", {"in_channels": 40, "out_channels": 16}, "takes 40 channels and predicts 16, not 16 and 16"),  # Fill
        ("flux", {"in_channels": 32, "out_channels": 16}, "takes 32 channels"),  # Canny, Depth
        ("sd", {"in_channels": 9}, "takes 9 channels and predicts 4, not 4 and 4"),  # inpainting
        ("sd", {"in_channels": 8}, "takes 8 channels"),  # InstructPix2Pix
        ("wan", {"in_channels": 12}, "takes 12 channels"),  # image-to-video
        ("hunyuan", {"in_channels": 9}, "takes 9 channels"),  # image-to-video of its authors
        ("sd", {"time_cond_proj_dim": 32}, "time_cond_proj_dim 32"),  # LCM: guidance as an input, without which it runs, differently
        ("sd", {"class_embed_type": "timestep"}, "class_embed_type timestep"),
    ],
)
def test_variants_are_refused(copy, family, inputs, said):
    """With weights that fit their config, so that nothing else is wrong."""
    model, kind = copy(family), FAMILIES[family]
    folder = model / kind.network_folder
    network_class = getattr(diffusers, kind.network.class_name)
    config = network_class.load_config(folder)
    shutil.rmtree(folder)
    network_class.from_config(config | inputs).save_pretrained(folder)
    message = sentence(model, family, "training")
    assert said in message
    assert "variant" in message


def test_a_quantised_network_is_refused(copy):
    model = copy("flux")
    change(model / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised weights cannot be trained" in sentence(model)


def test_a_transformer_at_the_root_is_named(copy):
    """As SkyReels is published."""
    model = copy("skyreels")
    message = sentence(model / "transformer")
    assert "it has no model_index.json, but a HunyuanVideoTransformer3DModel at its root" in message
    (model / "model_index.json").unlink()
    (model / "flux1-dev.safetensors").write_bytes(b"")
    assert "flux1-dev.safetensors is a file for other programs" in sentence(model)


def test_a_composed_folder_needs_its_own_pipeline(copy):
    """SkyReels with the parts of HunyuanVideo, and its model_index.json."""
    model = copy("skyreels")
    change(model / "model_index.json", _class_name="HunyuanVideoPipeline")
    assert "is a HunyuanVideoPipeline by its model_index.json, not the HunyuanSkyreelsImageToVideoPipeline" in sentence(model, "skyreels")
    assert "channels and predicts" in sentence(model)  # as what it says it is, it is a variant


def test_the_two_mistakes_with_skyreels_transformer(copy):
    """Its pipeline not named; and HunyuanVideo's transformer left where SkyReels' belongs."""
    model = copy("skyreels")
    change(model / "model_index.json", _class_name="HunyuanVideoPipeline")
    assert sentence(model, "skyreels").endswith("by the sed command of docs/models.md#skyreels-v1-i2v")
    change(model / "model_index.json", _class_name="HunyuanSkyreelsImageToVideoPipeline")
    shutil.copytree(MODELS / "hunyuan" / "transformer", model / "transformer", dirs_exist_ok=True)
    assert "it is not given the first frame: SkyReels' has another than HunyuanVideo; see docs/models.md" in sentence(model)


def test_what_else_a_folder_may_be(copy, tmp_path):
    hub = tmp_path / "models--a--b"
    shutil.copytree(MODELS / "wan", hub / "snapshots" / "0a1b")
    for given in (hub, hub / "snapshots"):
        assert sentence(given).endswith(f"it has no model_index.json; {hub}/snapshots/0a1b has one: give that")
    check_model(hub / "snapshots" / "0a1b")
    weights = hub / "snapshots" / "0a1b" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to("../../../blobs/ffff")
    assert f"{weights.name} is a link to ../../../blobs/ffff, which is not there" in sentence(hub / "snapshots" / "0a1b")
    for file in ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt", "Wan2.1_VAE.pth"):
        authors = tmp_path / Path(file).stem
        (authors / file).parent.mkdir(parents=True)
        (authors / file).touch()
        (authors / "config.json").write_text("{}")
        assert f"but {file}: it is in its authors' layout" in sentence(authors)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").touch()
    assert "is an adapter (LoRA), not a model" in sentence(lora)
    assert (
        sentence(lora / "pytorch_lora_weights.safetensors")
        == f"--model: {lora}/pytorch_lora_weights.safetensors is a file, not a model's folder"
    )


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("fp16", "vae"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bin", "vae"), ("bin", "text_encoder"), ("fp16", "text_encoder"))),
    ],
)
def test_other_formats_are_refused_with_a_command_that_converts_them(copy, kind, part):
    model = copy("sd")
    file = next((model / part).glob("*.safetensors"))
    if kind == "bin":
        torch.save(load_file(file), file.with_name({"vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}[part] + ".bin"))
        file.unlink()
    else:
        file.rename(file.with_suffix(".fp16.safetensors"))
    message = sentence(model)
    assert f"it has no {file.name}, only {'.bin files' if kind == 'bin' else 'the variant fp16'}" in message
    command = message.split("to convert: python -c ")[1].strip('"')
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    check_model(model)


def test_the_scripts_refuse_it_with_the_same_sentence(copy, tmp_path):
    model = copy("wan")
    change(model / "model_index.json", boundary_ratio=0.9)
    expected = sentence(model)
    for script, flags in (
        (CHECK, (model,)),
        (REPOSITORY / "preprocess" / "embed_wan.py", {"--prompts": REPOSITORY / "shapes/prompts/heldout.txt"}),
        (EVALUATE, {"--prompts": REPOSITORY / "shapes/prompts/heldout.txt", "--rewards": "aesthetic"}),
    ):
        words = flags if script == CHECK else (flags | {"--model": model, "--output_dir": tmp_path / "out"},)
        result = run_script(script, *words, log=tmp_path / "log")
        assert result.returncode == 2, result.stderr
        assert result.stderr.strip().splitlines()[-1].replace("MODEL ", "--model ") == f"error: {expected}"


@pytest.mark.parametrize("setting", [{"use_karras_sigmas": True}, {"invert_sigmas": True}, {"shift_terminal": 0.1}])
def test_evaluation_keeps_to_trainings_times_whatever_the_folders_scheduler_does(setting):
    """A scheduler's own spacing would be the pipeline's, and not training's."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, **setting)
    pipeline = SimpleNamespace(scheduler=scheduler)
    use_trained_sampler(pipeline, {"shift": 3.0, "sampling_steps": 8})
    pipeline.scheduler.set_timesteps(8)
    assert torch.allclose(pipeline.scheduler.sigmas, time_schedule(8, 3.0), atol=1e-6)
