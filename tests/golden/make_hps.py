# ruff: noqa: RUF001 (letters that look like others are what the texts are for)
"""Golden scores of HPS-v2 and open_clip by their own packages: writes hps.json beside this file. Tests read it; training needs neither.

torchvision, which both need, does not import beside this project's torch, so they have an environment of their own (Python 3.11):

    python -m venv /tmp/hps && . /tmp/hps/bin/activate
    pip install torch==2.5.1 torchvision==0.20.1 open_clip_torch==3.3.0 pillow==11.3.0 protobuf==3.20.3 clint requests
    pip install --no-deps hpsv2==1.2.0                               # it pins pytest, and wants pandas and webdataset
    cd /tmp/hps/lib/python3.11/site-packages && cp open_clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/; cd -   # not in its wheel
    python tests/golden/make_hps.py

The checkpoints are tiny and random, in the published formats, and made again from their seed by the tests. Where hpsv2 imports beside
transformers (torch 2.6 with torchvision 0.21, for one), tests/test_hps_reward.py compares with it live too.
"""

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

RESULT = Path(__file__).with_name("hps.json")

SIZES = [(224, 224), (300, 300), (128, 96), (180, 320), (333, 217), (64, 448), (720, 720), (1024, 512)]  # height, width
PROMPTS = [
    "a photo of a cat",
    "A  Cyberpunk city,\n at night -- trending on ArtStation!",
    "“Schrödinger’s cat” &amp;amp; its owner, l’été à Paris",
    "a very long prompt about a red fox in the snow, 4k, highly detailed, " * 8,
]
TEXTS = [
    *PROMPTS,
    "",
    "   ",
    "it's they'll I'd we've you're don't o'clock 'tis",
    "3,141.59 km/h 100% #1 @home a_b C++ <b>bold</b> &lt;i&gt; &copy; &nbsp;x",
    "naïve café ﬁne ﬂow Ⅷ ½ x² ÅÅ e\u0301 İstanbul ẞ ſ 'ſ",
    "猫と犬 кошка и собака قطة 고양이 🐱🐶 👩‍👩‍👧 🇩🇪 \u200b\ufeff zero",
    "sÃ¼Ã Ã© broken utf8 Ã¢â‚¬â„¢ here â€œquotedâ€\x9d",
    "<i>fish</i> &amp;amp; chips &amp;lt;3",
    "<start_of_text> a <end_of_text> b <|endoftext|> c <END_OF_TEXT>",
    "antidisestablishmentarianism supercalifragilisticexpialidocious zzzzzzzzzzzzzzzzzzzzqqqqqqqq",
    "tab\tnew\r\nline\x0bvertical\x1cfile\x85next\u2028line\xa0nbsp\u3000wide",
    "ALL CAPS shouting!!! ... --- ~~~ (((masterpiece:1.3))), [bad|worse], {x}",
    "word " * 75,
    "word " * 76,
]

HPS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 80, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
DFN = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 70, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14, "mlp_ratio": 3.1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}
PREPROCESSING = {  # name -> preprocess_cfg of open_clip_config.json
    "squash": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "squash"},
    "shortest": {"interpolation": "bilinear", "resize_mode": "shortest"},
    "longest": {"interpolation": "bicubic", "resize_mode": "longest", "fill_color": 100},
}


def random_weights(network: dict, seed: int) -> dict[str, torch.Tensor]:
    """All weights of an open_clip ViT, by open_clip's keys, large enough that scores of different pictures and prompts differ."""
    draw = np.random.RandomState(seed)  # whose numbers are the same for ever
    vision, text, dim = network["vision_cfg"], network["text_cfg"], network["embed_dim"]

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return torch.from_numpy((mean + std * draw.standard_normal(shape)).astype(np.float32))

    def norm(key: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{key}.weight": normal(width, std=0.2, mean=1.0), f"{key}.bias": normal(width, std=0.2)}

    def linear(key: str, out: int, width: int) -> dict[str, torch.Tensor]:
        return {f"{key}weight": normal(out, width, std=1.5 * width**-0.5), f"{key}bias": normal(out, std=0.2)}

    def blocks(prefix: str, tower: dict) -> dict[str, torch.Tensor]:
        width, mlp, weights = tower["width"], int(tower["width"] * tower.get("mlp_ratio", 4)), {}
        for i in range(tower["layers"]):
            block = f"{prefix}.resblocks.{i}"
            weights |= norm(f"{block}.ln_1", width) | linear(f"{block}.attn.in_proj_", 3 * width, width)
            weights |= linear(f"{block}.attn.out_proj.", width, width) | norm(f"{block}.ln_2", width)
            weights |= linear(f"{block}.mlp.c_fc.", mlp, width) | linear(f"{block}.mlp.c_proj.", width, mlp)
        return weights

    width, patch = vision["width"], vision["patch_size"]
    weights = {
        "positional_embedding": normal(text["context_length"], text["width"], std=0.3),
        "text_projection": normal(text["width"], dim, std=text["width"] ** -0.5),
        "logit_scale": torch.tensor(4.6052),
        "visual.class_embedding": normal(width),
        "visual.positional_embedding": normal((vision["image_size"] // patch) ** 2 + 1, width, std=0.3),
        "visual.proj": normal(width, dim, std=width**-0.5),
        "visual.conv1.weight": normal(width, 3, patch, patch, std=2 / patch),
        "token_embedding.weight": normal(text["vocab_size"], text["width"]),
    }
    weights |= norm("visual.ln_pre", width) | norm("visual.ln_post", width) | norm("ln_final", text["width"])
    return weights | blocks("visual.transformer", vision) | blocks("transformer", text)


def save_hps(path: Path) -> None:
    """A tiny HPS-v2 checkpoint: in half precision, as the "compressed" ones."""
    torch.save({"state_dict": {key: weight.half() for key, weight in random_weights(HPS, seed=1).items()}}, path)


def picture(height: int, width: int) -> np.ndarray:
    """Coloured blocks of several sizes and some noise: (height, width, 3) uint8, the same for ever."""
    draw = np.random.RandomState(height * 10000 + width)
    image = np.zeros((height, width, 3), np.int64)
    for block in (97, 31, 7):
        coarse = draw.randint(0, 60, (height // block + 1, width // block + 1, 3))
        image += coarse.repeat(block, 0).repeat(block, 1)[:height, :width]
    return (image + draw.randint(0, 60, image.shape)).astype(np.uint8)


def hps_scores(checkpoint: Path) -> list[list[float]]:
    """hpsv2's own scores, a row for each size, by its own way from picture and prompt on."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip import add_model_config, create_model_and_transforms

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.json").write_text(json.dumps(HPS))
        add_model_config(folder)
    # as initialize_model does, but for the name and for the download of weights, which the checkpoint replaces
    model, _, preprocess = create_model_and_transforms("tiny", precision="amp", light_augmentation=True, output_dict=True)
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    pictures = [Image.fromarray(picture(*size)) for size in SIZES]
    scores = [img_score.score(pictures, prompt, cp=str(checkpoint)) for prompt in PROMPTS]
    return np.array(scores, np.float64).T.tolist()


def full_size() -> dict:
    """The number of weights of hpsv2's ViT-H-14; keys and shapes of them, of the first block of each tower only."""
    from hpsv2.src.open_clip import create_model

    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in create_model("ViT-H-14", device="meta").state_dict().items()}
    return {"number": len(shapes), "shapes": {k: v for k, v in shapes.items() if "resblocks." not in k or "resblocks.0." in k}}


def random_pixels() -> torch.Tensor:
    """Pictures as DFN's network takes them."""
    return torch.from_numpy(np.random.RandomState(3).standard_normal((5, 3, 70, 70)).astype(np.float32))


def open_clip_scores() -> dict[str, list[list[float]]]:
    """open_clip's own cosines for each of PREPROCESSING, a row for each size; and of `random_pixels`, which are not preprocessed."""
    import open_clip

    scores = {}
    for name, preprocessing in PREPROCESSING.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.save(random_weights(DFN, seed=2), Path(folder) / "open_clip_pytorch_model.bin")
            config = {"model_cfg": DFN, "preprocess_cfg": preprocessing}
            (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
            model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        images = torch.stack([preprocess(Image.fromarray(picture(*size))) for size in SIZES])
        for key, pixels in ((name, images), ("no preprocessing", random_pixels())):
            with torch.no_grad():
                image = model.eval().encode_image(pixels, normalize=True)
                text = model.encode_text(open_clip.tokenize(PROMPTS), normalize=True)
            scores[key] = (image @ text.T).double().tolist()
    return scores


def main() -> None:
    import hpsv2.src.open_clip
    import open_clip
    import torchvision

    with tempfile.TemporaryDirectory() as folder:
        save_hps(Path(folder) / "hps.pt")
        hps = hps_scores(Path(folder) / "hps.pt")
    tokens = open_clip.tokenize(TEXTS)
    assert torch.equal(tokens, hpsv2.src.open_clip.tokenize(TEXTS))
    result = {
        "versions": {
            "python": platform.python_version(),
            "hpsv2": "1.2.0",
            "open_clip": open_clip.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "hps": hps,
        "open_clip": open_clip_scores(),
        "tokens": [np.trim_zeros(row.numpy(), "b").tolist() for row in tokens],
        "vit_h_14": full_size(),
    }
    RESULT.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
