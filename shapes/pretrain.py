"""Trains the embedded models from scratch on a CPU: `python shapes/pretrain.py`, or single stages with `--stages vae flux`.

tokenizers  are built, not trained
vae         AutoencoderKL on all kinds of pictures
clip        CLIPModel on captions against hard negatives; its text encoder is FLUX's pooled text encoder as well
flux        FluxTransformer2DModel and T5EncoderModel by rectified flow, on *loose* captions: see `caption_noise`
sd          Stable Diffusion: UNet2DConditionModel with FLUX's VAE and CLIP's text encoder, on the same captions
video_vae   AutoencoderKLHunyuanVideo on shaky clips and pictures, for both of:
video_decoder  its decoder, trained on for these latents
hunyuan     HunyuanVideo: HunyuanVideoTransformer3DModel and LlamaModel, on loose captions; CLIP's text encoder is the pooled one
skyreels    SkyReels-I2V: HunyuanVideo's transformer, which learns to go on from a picture
wan_vae     AutoencoderKLWan on shaky clips and pictures, for:
wan         Wan 2.1: WanTransformer3DModel and UMT5EncoderModel, on loose captions
evaluate    measures what was saved, and prints it
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script, from any folder

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FluxPipeline,
    HunyuanVideoPipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5Tokenizer

from shapes import tiny_models, tiny_wan, video_training
from shapes.evaluation import evaluate_checker, evaluate_clip, evaluate_flux, evaluate_sd, evaluate_vae
from shapes.prompt_files import RL_COLOURS, RL_SPECS, split
from shapes.tiny_wan import evaluate_wan, evaluate_wan_vae
from shapes.training import half_copy, optimise, pictures_of
from shapes.video_evaluation import evaluate_hunyuan, evaluate_skyreels, evaluate_video_vae
from shapes.world import SHAPES, caption, compatible, mutate, sample_spec

FLUX_SHIFT = 3.0
PADDING = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

Stage = Literal[
    "tokenizers", "vae", "clip", "flux", "sd", "video_vae", "video_decoder", "hunyuan", "skyreels", "wan_vae", "wan", "evaluate"
]


@dataclass
class Args:
    stages: tuple[Stage, ...] = get_args(Stage)
    """What to do, in this order. A stage reads what earlier stages saved."""
    output_dir: Path = Path(__file__).resolve().parent / "models"
    """Where the models go: `flux/`, `sd/`, `hunyuan/`, `skyreels/` and `clip/` in it."""
    seed: int = 0
    """Seed of all weights and data. The same seed gives the same models on the same machine and number of threads."""
    threads: int = 2
    """CPU threads."""
    compile: bool = False
    """Compile FLUX and the UNet for training (needs a C++ compiler): a minute first, then 1.7 and 1.3 times as fast."""
    vae_steps: int = 1500
    """Training steps of the VAE, 32 pictures each."""
    clip_steps: int = 2500
    """Training steps of CLIP, 96 pictures each."""
    flux_steps: int = 6000
    """Training steps of FLUX, 64 pictures each."""
    flux_learning_rate: float = 1.2e-3
    """Peak learning rate of FLUX."""
    sd_steps: int = 5000
    """Training steps of Stable Diffusion, 64 pictures each."""
    sd_learning_rate: float = 1.5e-3
    """Peak learning rate of Stable Diffusion."""
    video_vae_steps: int = 1600
    """Training steps of the video VAE, 4 clips and 8 pictures each; before them a quarter as many with 24 pictures."""
    video_decoder_steps: int = 2500
    """Further training steps of its decoder alone, 4 clips and 4 pictures each."""
    hunyuan_steps: int = 5000
    """Training steps of HunyuanVideo, 48 clips and 16 pictures each."""
    hunyuan_train_on: bool = False
    """Start HunyuanVideo from the weights in `output_dir`, not from fresh ones."""
    hunyuan_learning_rate: float = 1.2e-3
    """Peak learning rate of HunyuanVideo."""
    skyreels_steps: int = 1200
    """Training steps of SkyReels, 48 clips each."""
    skyreels_learning_rate: float = 1e-3
    """Peak learning rate of SkyReels."""
    wan_vae_steps: int = 1200
    """Training steps of Wan's VAE, 4 clips and 8 pictures each; before them a quarter as many with 24 pictures."""
    wan_steps: int = 1800
    """Training steps of Wan, 48 clips and 16 pictures each."""
    wan_learning_rate: float = 1.2e-3
    """Peak learning rate of Wan."""


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    stages = {
        "tokenizers": save_tokenizers,
        "vae": train_vae,
        "clip": train_clip,
        "flux": train_flux,
        "evaluate": evaluate,
        "sd": train_sd,  # after the others, which are seeded by their place
        "video_vae": train_video_vae,
        "hunyuan": train_hunyuan,
        "skyreels": train_skyreels,
        "video_decoder": train_video_decoder,
        "wan_vae": train_wan_vae,
        "wan": train_wan,
    }
    for stage in args.stages:
        torch.manual_seed(args.seed)
        stages[stage](args, np.random.default_rng([args.seed, list(stages).index(stage)]))


def save_tokenizers(args: Args, rng: np.random.Generator) -> None:
    tiny_models.clip_tokenizer().save_pretrained(args.output_dir / "clip")
    tiny_models.clip_tokenizer().save_pretrained(args.output_dir / "flux" / "tokenizer")
    tiny_models.t5_tokenizer().save_pretrained(args.output_dir / "flux" / "tokenizer_2")


def train_vae(args: Args, rng: np.random.Generator) -> None:
    """L1 + L2 reconstruction and a small pull to the normal distribution; then shift and scale so that latents have mean 0, variance 1."""
    pictures = pictures_of([sample_spec(rng) for _ in range(12000)], rng)
    vae = tiny_models.image_vae().to(memory_format=torch.channels_last)

    def loss_function() -> torch.Tensor:
        x = pictures[torch.randint(len(pictures), (32,))].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return (y - x).abs().mean() + 2 * (y - x).square().mean() + 2e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    optimise(loss_function, list(vae.parameters()), args.vae_steps, 2e-3, "vae")
    with torch.no_grad():
        latents = vae.encode(pictures[:1000]).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.half().save_pretrained(args.output_dir / "flux" / "vae")
    evaluate_vae(AutoencoderKL.from_pretrained(args.output_dir / "flux" / "vae"), np.random.default_rng(args.seed))


def train_clip(args: Args, rng: np.random.Generator) -> None:
    """Contrastive: each picture against the batch's captions and one hard negative a picture, each caption against the pictures."""
    specs = [sample_spec(rng) for _ in range(40000)]
    pictures = (pictures_of(specs, rng) / 2 + 0.5 - CLIP_MEAN) / CLIP_STD
    tokenizer = CLIPTokenizer.from_pretrained(args.output_dir / "clip")
    model = tiny_models.clip_model(tokenizer)

    def loss_function() -> torch.Tensor:
        batch = rng.integers(len(specs), size=96)
        right = [specs[i] for i in batch]
        wrong = [mutate(spec, rng) for spec in right]
        tokens = tokenizer([caption(spec) for spec in right + wrong], padding="max_length", truncation=True, return_tensors="pt")
        output = model(input_ids=tokens.input_ids, pixel_values=pictures[batch])
        logits = output.logits_per_image  # (96, 192)
        true_too = torch.tensor([[compatible(mine, other) for other in right + wrong] for mine in right])
        true_too[range(96), range(96)] = False
        logits = logits.masked_fill(true_too, -1e4)  # another picture's caption that is true of this one as well is no negative
        target = torch.arange(96)
        return F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits[:, :96].T, target)

    optimise(loss_function, list(model.parameters()), args.clip_steps, 1.5e-3, "clip", weight_decay=0.05)
    model.save_pretrained(args.output_dir / "clip")
    tiny_models.clip_image_processor().save_pretrained(args.output_dir / "clip")
    CLIPTextModel.from_pretrained(args.output_dir / "clip").save_pretrained(args.output_dir / "flux" / "text_encoder")
    evaluate_clip(args.output_dir / "clip", np.random.default_rng(args.seed))


def caption_noise(colour_noise: float = 0.35, shape_noise: float = 0.25) -> torch.Tensor:
    """How a careless author describes pictures: (144, 144), the probability of each of `RL_SPECS` as the caption of each of them.

    Every colour is drawn anew with probability 0.35 and every shape with 0.25, as captions from the web are loose descriptions. A model
    trained on such captions draws well-formed pictures but follows its prompt only loosely: it leaves something for RL to sharpen.
    """

    def probability(thing: tuple[str, str], named: tuple[str, str]) -> float:
        colour = (1 - colour_noise) * (thing[0] == named[0]) + colour_noise / len(RL_COLOURS)
        return colour * ((1 - shape_noise) * (thing[1] == named[1]) + shape_noise / len(SHAPES))

    noise = torch.zeros(len(RL_SPECS), len(RL_SPECS))
    for (i, spec), (j, other) in product(enumerate(RL_SPECS), enumerate(RL_SPECS)):
        if len(spec.objects) == len(other.objects):
            noise[i, j] = np.prod([probability(thing, named) for thing, named in zip(spec.objects, other.objects)])
    return noise / noise.sum(1, keepdim=True)


def train_flux(args: Args, rng: np.random.Generator) -> None:
    """Rectified flow on cached latents: z_t = (1 - t) x0 + t noise, and the model predicts u = noise - x0."""
    folder = args.output_dir / "flux"
    vae, text_encoder = AutoencoderKL.from_pretrained(folder / "vae"), CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer, tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    transformer, text_encoder_2 = tiny_models.flux_transformer(), tiny_models.t5_encoder(tokenizer_2)
    captions, noise_of_captions = [caption(spec) for spec in RL_SPECS], caption_noise()
    t5_ids = tokenizer_2(captions, **PADDING).input_ids
    with torch.no_grad():
        pooled = text_encoder(tokenizer(captions, **PADDING).input_ids).pooler_output
    latents, spec_indices = captioned_latents(vae, rng)
    height = width = latents.shape[-1] // 2
    image_ids = FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
    text_ids = torch.zeros(tiny_models.TEXT_LENGTH, 3)
    latents = FluxPipeline._pack_latents(latents, len(latents), 4, 2 * height, 2 * width)  # (N, 16, 16)
    predict = torch.compile(transformer) if args.compile else transformer

    def loss_function() -> torch.Tensor:
        batch = torch.randint(len(latents), (64,))
        named = torch.multinomial(noise_of_captions[spec_indices[batch]], 1)[:, 0]
        x0, noise = latents[batch], torch.randn(64, *latents.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(64))
        t = 2 * t / (1 + t)  # towards noise, as sampling with a shift does
        u_hat = predict(
            hidden_states=(1 - t[:, None, None]) * x0 + t[:, None, None] * noise,
            timestep=t,
            encoder_hidden_states=text_encoder_2(t5_ids[named]).last_hidden_state,
            pooled_projections=pooled[named],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return (u_hat - (noise - x0)).square().mean()

    def save(step: int) -> None:
        scheduler = tiny_models.flow_scheduler(FLUX_SHIFT)
        parts = (scheduler, half_copy(vae), text_encoder, tokenizer, text_encoder_2, tokenizer_2, half_copy(transformer))
        FluxPipeline(*parts).save_pretrained(folder)
        evaluate_flux(folder, captions[:12] * 11 + captions[12:], 2, args.seed, f"step {step}")

    parameters = [*transformer.parameters(), *text_encoder_2.parameters()]
    optimise(loss_function, parameters, args.flux_steps, args.flux_learning_rate, "flux", weight_decay=0.01, every=(1000, save))
    save(args.flux_steps)


def train_sd(args: Args, rng: np.random.Generator) -> None:
    """Epsilon-prediction on cached latents: z_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise. Some captions are dropped, for CFG."""
    folder, flux = args.output_dir / "sd", args.output_dir / "flux"
    vae, text_encoder = AutoencoderKL.from_pretrained(flux / "vae"), CLIPTextModel.from_pretrained(flux / "text_encoder")
    vae.register_to_config(shift_factor=None)  # StableDiffusionPipeline would not shift: the latents' mean is near 0, not 0
    tokenizer, unet, scheduler = CLIPTokenizer.from_pretrained(args.output_dir / "clip"), tiny_models.sd_unet(), tiny_models.sd_scheduler()
    captions, noise_of_captions = [caption(spec) for spec in RL_SPECS], caption_noise()
    with torch.no_grad():
        text = text_encoder(tokenizer([*captions, ""], **PADDING).input_ids).last_hidden_state
    latents, spec_indices = captioned_latents(vae, rng)
    predict = torch.compile(unet) if args.compile else unet

    def loss_function() -> torch.Tensor:
        batch = torch.randint(len(latents), (64,))
        named = torch.multinomial(noise_of_captions[spec_indices[batch]], 1)[:, 0]
        named[torch.rand(64) < 0.1] = len(captions)  # the empty one
        noise, t = torch.randn(64, *latents.shape[1:]), torch.randint(scheduler.config.num_train_timesteps, (64,))
        eps_hat = predict(scheduler.add_noise(latents[batch], noise, t), t, text[named], return_dict=False)[0]
        return (eps_hat - noise).square().mean()

    def save(step: int) -> None:
        parts = (half_copy(vae), text_encoder, tokenizer, half_copy(unet), scheduler, None, None)
        StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
        evaluate_sd(folder, captions[:12] * 11 + captions[12:], 1, args.seed, f"step {step}")

    optimise(loss_function, list(unet.parameters()), args.sd_steps, args.sd_learning_rate, "sd", weight_decay=0.01, every=(1000, save))
    save(args.sd_steps)


def captioned_latents(vae: AutoencoderKL, rng: np.random.Generator, number: int = 30000) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 4, 8, 8) of pictures, two fifths of them single objects, and what they show: (N,) indices into `RL_SPECS`."""
    spec_indices = np.where(rng.random(number) < 0.4, rng.integers(12, size=number), rng.integers(12, len(RL_SPECS), size=number))
    return encode(vae, pictures_of([RL_SPECS[i] for i in spec_indices], rng)), torch.from_numpy(spec_indices)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Scaled latents of pictures in [-1, 1]: (N, 3, 32, 32) -> (N, 4, 8, 8) of mean 0 (about 0 if the VAE has no shift) and variance 1."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(500)])
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def train_video_vae(args: Args, rng: np.random.Generator) -> None:
    video_training.train_video_vae(args.output_dir / "hunyuan" / "vae", args.video_vae_steps, rng)


def train_video_decoder(args: Args, rng: np.random.Generator) -> None:
    video_training.train_video_decoder(args.output_dir / "hunyuan" / "vae", args.video_decoder_steps, rng)


def train_hunyuan(args: Args, rng: np.random.Generator) -> None:
    folder = args.output_dir / "hunyuan"
    if args.hunyuan_train_on:
        pipeline = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    else:
        pipeline = video_training.fresh_hunyuan(folder / "vae", args.output_dir / "clip")
    video_training.train_hunyuan(pipeline, folder, args.hunyuan_steps, args.hunyuan_learning_rate, args.compile, rng)


def train_skyreels(args: Args, rng: np.random.Generator) -> None:
    hunyuan = HunyuanVideoPipeline.from_pretrained(args.output_dir / "hunyuan", dtype=torch.float32)
    folder = args.output_dir / "skyreels"
    video_training.train_skyreels(hunyuan, folder, args.skyreels_steps, args.skyreels_learning_rate, args.compile, rng)


def train_wan_vae(args: Args, rng: np.random.Generator) -> None:
    tiny_wan.train_wan_vae(args.output_dir / "wan" / "vae", args.wan_vae_steps, rng)


def train_wan(args: Args, rng: np.random.Generator) -> None:
    tiny_wan.train_wan(args.output_dir / "wan", args.wan_steps, args.wan_learning_rate, args.compile, rng)


def evaluate(args: Args, rng: np.random.Generator) -> None:
    """Prints every number of `shapes/models/README.md`."""
    evaluate_checker(rng)
    evaluate_vae(AutoencoderKL.from_pretrained(args.output_dir / "flux" / "vae"), rng)
    evaluate_clip(args.output_dir / "clip", rng)
    for name, specs in zip(("train.txt", "heldout.txt"), split()):
        evaluate_flux(args.output_dir / "flux", [caption(spec) for spec in specs], 40, args.seed, name)
    evaluate_flux(args.output_dir / "flux", [caption(spec) for spec in RL_SPECS], 16, args.seed, "all 144 captions")
    for name, specs in zip(("train.txt", "heldout.txt"), split()):
        for guidance_scale in (1.0, 3.0):
            evaluate_sd(args.output_dir / "sd", [caption(spec) for spec in specs], 40, args.seed, name, guidance_scale)
    evaluate_video_vae(AutoencoderKLHunyuanVideo.from_pretrained(args.output_dir / "hunyuan" / "vae"), rng)
    evaluate_hunyuan(args.output_dir / "hunyuan", 10, args.seed, "all captions")
    for guidance_scale in (1.0, 3.0):
        evaluate_skyreels(args.output_dir / "skyreels", 10, args.seed, "all captions", guidance_scale)
    evaluate_wan_vae(AutoencoderKLWan.from_pretrained(args.output_dir / "wan" / "vae", dtype=torch.float32), rng)
    for guidance_scale in (1.0, 2.0):
        evaluate_wan(args.output_dir / "wan", 10, args.seed, "all captions", guidance=guidance_scale)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
