"""Measures the saved models: `python shapes/pretrain.py --stages evaluate` prints all of it."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FluxPipeline, StableDiffusionPipeline

from fastvideo.rewards.clip import load_clip
from shapes.checker import aesthetic, check
from shapes.training import pictures_of
from shapes.world import QUESTIONS, Spec, all_specs, caption, compatible, mutate, parse, render, sample_spec


def evaluate_checker(rng: np.random.Generator, number: int = 1000) -> None:
    """The checker on rendered pictures: of their own captions, of other pictures' captions, and of captions wrong in one respect."""
    print("checker, strict score by question (right caption, another picture's caption, mutated caption):")
    for question in QUESTIONS:
        population = [spec for spec in all_specs() if spec.question == question]
        specs = [population[i] for i in rng.integers(len(population), size=number)]
        others = [different(spec, population, rng) for spec in specs]
        images = render(specs, rng)
        scores = [check(images, wanted)["strict"].mean() for wanted in (specs, others, [mutate(spec, rng) for spec in specs])]
        print(f"  {question:12s}" + "".join(f"{score:8.4f}" for score in scores))


def different(spec: Spec, population: list[Spec], rng: np.random.Generator) -> Spec:
    """A random member of `population` that can't be true of `spec`'s picture."""
    while compatible(spec, other := population[rng.integers(len(population))]):
        pass
    return other


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKL, rng: np.random.Generator, number: int = 1000) -> None:
    """Mean squared error of reconstructed pictures in [0, 1], what the checker says of them, and the latents' moments."""
    specs = [sample_spec(rng) for _ in range(number)]
    pictures = pictures_of(specs, rng)
    latents = vae.encode(pictures).latent_dist.mode()
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    strict = check((decoded / 2 + 0.5).numpy(), specs)["strict"]
    by_question = {question: strict[[spec.question == question for spec in specs]].mean().round(3).item() for question in QUESTIONS}
    print(f"vae: mse {((decoded - pictures) / 2).square().mean():.2e}, strict {strict.mean():.3f} {by_question}")
    print(f"vae: scaled latents have mean {scaled.mean():.3f}, std {scaled.std():.3f}, by channel {scaled.std((0, 2, 3)).numpy().round(2)}")


def evaluate_clip(folder: Path, rng: np.random.Generator, number: int = 2000) -> None:
    """How often the CLIP reward of a picture's own caption is above that of a mutated one, and of another picture's."""
    reward = load_clip(str(folder), torch.device("cpu"))
    specs = [sample_spec(rng) for _ in range(number)]
    pictures = pictures_of(specs, rng)

    def score(wanted: list[Spec]) -> np.ndarray:
        return reward(pictures, [{"prompt": caption(spec)} for spec in wanted]).numpy()

    right, mutated = score(specs), score([mutate(spec, rng) for spec in specs])
    other = score([different(spec, all_specs(), rng) for spec in specs])
    by_question = {q: (right > mutated)[[spec.question == q for spec in specs]].mean().round(3).item() for q in QUESTIONS}
    print(f"clip: cosine of right captions {right.mean():.3f}, mutated {mutated.mean():.3f}, other {other.mean():.3f}")
    print(f"clip: right above mutated {(right > mutated).mean():.3f} {by_question}, right above other {(right > other).mean():.3f}")


def evaluate_flux(folder: Path, prompts: list[str], images_per_prompt: int, seed: int, name: str) -> np.ndarray:
    """`evaluate_images` of a FLUX folder in 8 steps."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    arguments = {"num_inference_steps": 8, "max_sequence_length": 16}
    return evaluate_images(pipeline, prompts, images_per_prompt, seed, f"flux: {name}", arguments)


def evaluate_sd(folder: Path, prompts: list[str], images_per_prompt: int, seed: int, name: str, guidance_scale: float = 3.0) -> np.ndarray:
    """`evaluate_images` of a Stable Diffusion folder by DDIM in 20 steps."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    arguments = {"num_inference_steps": 20, "guidance_scale": guidance_scale}
    return evaluate_images(pipeline, prompts, images_per_prompt, seed, f"sd: {name}, guidance {guidance_scale:g}", arguments)


def evaluate_images(
    pipeline: DiffusionPipeline, prompts: list[str], images_per_prompt: int, seed: int, name: str, arguments: dict
) -> np.ndarray:
    """Prints the checker's scores of pictures that diffusers' pipeline makes; returns the pictures, (N, 3, 32, 32) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), 128):
        batch = pipeline(prompts[start : start + 128], height=32, width=32, generator=generator, output_type="np", **arguments)
        images.append(batch.images)
    images = np.concatenate(images).transpose(0, 3, 1, 2)
    specs = [parse(prompt) for prompt in prompts]
    scores = check(images, specs) | {"aesthetic": aesthetic(images)}
    single = np.array([len(spec.objects) == 1 for spec in specs])
    for kind, which in (("all", single | ~single), ("singles", single), ("pairs", ~single)):
        text = ", ".join(f"{key} {scores[key][which].mean():.3f}" for key in ("strict", "soft", "well_formed", "aesthetic"))
        print(f"{name}, {kind} ({which.sum()} pictures): {text}", flush=True)
    return images
