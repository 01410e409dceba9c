"""How the models of the shapes world in motion are trained; `shapes/pretrain.py` calls it.

Clips are shaky: each has its own jitter, up to 1.5 px, as hand-held videos have. Captions are loose: see `redraw`. So the models make
well-formed objects, whose motion and whose agreement with the caption leave something for RL to sharpen.
"""

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    ModelMixin,
)
from transformers import LlamaModel

from shapes import tiny_models, tiny_video_models, video, world
from shapes.tiny_video_models import CROP_START, DEFAULT_PROMPT_TEMPLATE, LATENT_CHANNELS
from shapes.training import half_copy, optimise
from shapes.video import FRAMES, MOTIONS
from shapes.video_evaluation import evaluate_hunyuan, evaluate_skyreels, evaluate_video_vae
from shapes.world import RL_COLOURS, SHAPES, Spec

SHIFT = 3.0
LARGEST_JITTER = 1.5  # pixels
NOISE = 0.2  # probability that a caption's colour is drawn anew, and the same for its motion
EMPTY_SHARE = 0.1  # of SkyReels' captions
STILL = len(MOTIONS)  # the number that stands for "no motion": a picture
TEXT_TOKENS = 6  # of the longest caption, and its end
# Every caption by the numbers of its colour, shape and motion, in one row: number = (colour * 3 + shape) * 7 + motion
CAPTIONS = [
    world.caption(Spec(((colour, shape),))) if motion is None else video.caption(video.VideoSpec(colour, shape, motion))
    for colour, shape, motion in product(RL_COLOURS, SHAPES, (*MOTIONS, None))
]


def shaky_clips(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips, (number, 3, 9, 32, 32) float32 in [-1, 1], and what they show: (number, 3) numbers of colour, shape and motion."""
    labels = rng.integers((len(RL_COLOURS), len(SHAPES), len(MOTIONS)), size=(number, 3))
    specs = [video.VideoSpec(RL_COLOURS[colour], SHAPES[shape], MOTIONS[motion]) for colour, shape, motion in labels]
    tracks = video.tracks(specs, FRAMES, rng, jitter=rng.uniform(0, LARGEST_JITTER, number))
    return torch.from_numpy(video.render_clips(specs, tracks, rng)) * 2 - 1, torch.from_numpy(labels)


def single_frames(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of one object as clips of one frame, (number, 3, 1, 32, 32) float32 in [-1, 1], and what they show as in `shaky_clips`."""
    labels = np.column_stack([rng.integers((len(RL_COLOURS), len(SHAPES)), size=(number, 2)), np.full(number, STILL)])
    specs = [Spec(((RL_COLOURS[colour], SHAPES[shape]),)) for colour, shape, _ in labels]
    return torch.from_numpy(world.render(specs, rng))[:, :, None] * 2 - 1, torch.from_numpy(labels)


def redraw(labels: torch.Tensor) -> torch.Tensor:
    """The captions of a careless author: numbers in `CAPTIONS`, (N,), for (N, 3) of what is shown.

    Colours and motions are drawn anew, each with a probability of 0.2, as captions from the web describe videos loosely.
    """
    colour, shape, motion = labels.T
    colour = torch.where(torch.rand(len(colour)) < NOISE, torch.randint(len(RL_COLOURS), colour.shape), colour)
    redrawn = (torch.rand(len(motion)) < NOISE) & (motion != STILL)
    motion = torch.where(redrawn, torch.randint(len(MOTIONS), motion.shape), motion)
    return (colour * len(SHAPES) + shape) * (len(MOTIONS) + 1) + motion


@torch.no_grad()
def latents_of(
    vae: AutoencoderKLHunyuanVideo, draw: Callable[[int, np.random.Generator], tuple], number: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled latents (number, 16, k + 1, 8, 8) of clips by `draw`, those of their first frames (number, 16, 1, 8, 8), their labels."""
    parts = []
    for _ in range(number // 200):
        clips, labels = draw(200, rng)
        latents, first = (vae.encode(shown).latent_dist.mode() * vae.config.scaling_factor for shown in (clips, clips[:, :, :1]))
        parts.append((latents, first, labels))
    latents, first, labels = (torch.cat(column) for column in zip(*parts))
    return latents, first, labels


def fit_video_vae(
    vae: AutoencoderKLHunyuanVideo | AutoencoderKLWan, name: str, steps: int, rng: np.random.Generator, save: Callable[[torch.Tensor], None]
) -> None:
    """L1 + L2 reconstruction of clips and pictures, and a small pull to the normal distribution.

    `save(clips)` is called every 500 steps and at the end, with clips to measure the latents' moments on.
    """
    clips, pictures = shaky_clips(2000, rng)[0], single_frames(2000, rng)[0]

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return (y - x).abs().mean() + 2 * (y - x).square().mean() + 1e-3 * divergence

    def still_loss() -> torch.Tensor:
        return loss_of(pictures[torch.randint(len(pictures), (24,))])

    def loss_function() -> torch.Tensor:
        return loss_of(clips[torch.randint(len(clips), (4,))]) + 0.3 * loss_of(pictures[torch.randint(len(pictures), (8,))])

    optimise(still_loss, list(vae.parameters()), steps // 4, 2e-3, f"{name}, pictures")  # what is quick to learn, where it is cheap
    optimise(loss_function, list(vae.parameters()), steps, 2e-3, name, every=(500, lambda step: save(clips[:500])))
    save(clips[:500])


def train_video_vae(folder: Path, steps: int, rng: np.random.Generator) -> None:
    """HunyuanVideo's VAE, saved in `folder`. It knows a scale of latents, but no shift: their mean moves into neighbouring convolutions."""
    vae = tiny_video_models.video_vae().to(memory_format=torch.channels_last_3d)

    def save(clips: torch.Tensor) -> None:
        trained = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            latents = trained.encode(clips).latent_dist.mode()
            mean = latents.mean((0, 2, 3, 4))
            trained.quant_conv.bias[:LATENT_CHANNELS] -= mean
            trained.quant_conv.bias[LATENT_CHANNELS:] -= 4  # the noise has done its work: a seventh of it is left
            trained.post_quant_conv.bias += trained.post_quant_conv.weight[:, :, 0, 0, 0] @ mean
        trained.register_to_config(scaling_factor=1 / (latents - mean.view(1, -1, 1, 1, 1)).std().item())
        trained.half().save_pretrained(folder)
        evaluate_video_vae(AutoencoderKLHunyuanVideo.from_pretrained(folder), np.random.default_rng(0), 144)

    fit_video_vae(vae, "video vae", steps, rng, save)


def train_video_decoder(folder: Path, steps: int, rng: np.random.Generator) -> None:
    """Trains the decoder of the VAE in `folder` on. The latents stay what they are, and so do transformers trained on them.

    Those will not hit latents exactly, so it learns from slightly noisy ones.
    """
    clips, pictures = shaky_clips(2000, rng)[0], single_frames(2000, rng)[0]
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder, dtype=torch.float32)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mode()
            latents += 0.2 / vae.config.scaling_factor * torch.rand(len(x), 1, 1, 1, 1) * torch.randn_like(latents)
        y = vae.decode(latents.contiguous(memory_format=torch.channels_last_3d)).sample
        return (y - x).abs().mean() + 2 * (y - x).square().mean()

    def loss_function() -> torch.Tensor:
        return loss_of(clips[torch.randint(len(clips), (4,))]) + 0.3 * loss_of(pictures[torch.randint(len(pictures), (4,))])

    def save(step: int) -> None:
        half_copy(vae).save_pretrained(folder)
        evaluate_video_vae(copy.deepcopy(vae), np.random.default_rng(0), 144)

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimise(loss_function, parameters, steps, 2e-3, "video decoder", every=(500, save))
    save(steps)


def fresh_hunyuan(vae_folder: Path, clip_folder: Path) -> HunyuanVideoPipeline:
    """A pipeline whose transformer and Llama are untrained, with the VAE and CLIP's text encoder that are in these folders."""
    text_encoder_2, tokenizer_2 = tiny_video_models.clip_text_encoder(clip_folder)
    tokenizer = tiny_video_models.llama_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=tiny_video_models.llama(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_video_models.hunyuan_transformer(),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(vae_folder, dtype=torch.float32),
        scheduler=tiny_models.flow_scheduler(SHIFT),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def train_hunyuan(pipeline: HunyuanVideoPipeline, folder: Path, steps: int, rate: float, compiled: bool, rng: np.random.Generator) -> None:
    """Its transformer and Llama, three quarters on clips and a quarter on pictures; saves `folder`. rate: peak learning rate."""
    transformer, llama = pipeline.transformer, pipeline.text_encoder
    with torch.no_grad():
        _, pooled, mask = pipeline.encode_prompt(CAPTIONS, max_sequence_length=TEXT_TOKENS)
    tokenizer = pipeline.tokenizer
    filled = [DEFAULT_PROMPT_TEMPLATE["template"].format(caption) for caption in CAPTIONS]
    ids = tokenizer(filled, padding="max_length", max_length=CROP_START + TEXT_TOKENS, return_tensors="pt").input_ids
    clips, _, clip_labels = latents_of(pipeline.vae, shaky_clips, 7200, rng)
    pictures, _, picture_labels = latents_of(pipeline.vae, single_frames, 2400, rng)
    predict = torch.compile(transformer, dynamic=False) if compiled else transformer

    def loss_function() -> torch.Tensor:
        states = prompt_states(llama, ids)
        losses = []
        for latents, labels, number in ((clips, clip_labels, 48), (pictures, picture_labels, 16)):
            batch = torch.randint(len(latents), (number,))
            named = redraw(labels[batch])
            losses.append(flow_loss(predict, latents[batch], (states[named], mask[named], pooled[named])))
        return 0.75 * losses[0] + 0.25 * losses[1]

    def save(step: int) -> None:
        save_pipeline(pipeline, folder)
        evaluate_hunyuan(folder, 2, 0, f"step {step}")

    unused = {id(parameter) for layer in llama.layers[-2:] for parameter in layer.parameters()} | {id(llama.norm.weight)}
    parameters = [p for p in (*transformer.parameters(), *llama.parameters()) if id(p) not in unused]
    optimise(loss_function, parameters, steps, rate, "hunyuan", weight_decay=0.01, every=(500, save))
    save(steps)


def train_skyreels(hunyuan: HunyuanVideoPipeline, folder: Path, steps: int, rate: float, compiled: bool, rng: np.random.Generator) -> None:
    """SkyReels from HunyuanVideo: its transformer sees the first frame's latents in 16 more channels, zeros at first; saves `folder`.

    A tenth of the captions is empty, as in guidance's other branch.
    """
    parts = dict(hunyuan.components)
    weights = parts["transformer"].state_dict()
    parts["transformer"] = transformer = tiny_video_models.hunyuan_transformer("skyreels")
    kernel = weights["x_embedder.proj.weight"]
    transformer.load_state_dict(weights | {"x_embedder.proj.weight": torch.cat([kernel, torch.zeros_like(kernel)], dim=1)})
    pipeline = HunyuanSkyreelsImageToVideoPipeline(**parts)
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt([*CAPTIONS, ""], max_sequence_length=TEXT_TOKENS)
    clips, first, labels = latents_of(parts["vae"], shaky_clips, 7200, rng)
    predict = torch.compile(transformer, dynamic=False) if compiled else transformer

    def loss_function() -> torch.Tensor:
        batch = torch.randint(len(clips), (48,))
        named = torch.where(torch.rand(48) < EMPTY_SHARE, len(CAPTIONS), redraw(labels[batch]))
        image = torch.cat([first[batch], torch.zeros_like(clips[batch, :, 1:])], dim=2)
        return flow_loss(predict, clips[batch], (states[named], mask[named], pooled[named]), image)

    def save(step: int) -> None:
        save_pipeline(pipeline, folder)
        evaluate_skyreels(folder, 2, 0, f"step {step}")

    optimise(loss_function, list(transformer.parameters()), steps, rate, "skyreels", weight_decay=0.01, every=(500, save))
    save(steps)


def prompt_states(llama: LlamaModel, ids: torch.Tensor) -> torch.Tensor:
    """What the pipelines' `encode_prompt` says of templates filled in: token numbers (N, 95 + T) -> (N, T, 64).

    They all begin alike, so Llama reads that part once. Text is causal: padding behind it changes nothing.
    """
    beginning = llama(ids[:1, :CROP_START], use_cache=True).past_key_values
    beginning.batch_repeat_interleave(len(ids))
    return llama(ids[:, CROP_START:], past_key_values=beginning, output_hidden_states=True).hidden_states[-3]


def flow_loss(
    predict: Callable[..., tuple[torch.Tensor]],
    x0: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    image: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rectified flow: z_t = (1 - t) x0 + t noise, and the model predicts u = noise - x0.

    text: Llama's states, their mask, CLIP's pooled embedding. image: further channels beside z_t, of x0's shape.
    """
    noise = torch.randn_like(x0)
    t = torch.sigmoid(1.2 * torch.randn(len(x0)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)  # towards noise, as sampling with a shift does
    z = torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))
    states, mask, pooled = text
    u_hat = predict(
        hidden_states=z if image is None else torch.cat([z, image], dim=1),
        timestep=1000 * t,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (u_hat - (noise - x0)).square().mean()


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a copy of it in float16."""
    parts = {name: half_copy(part) if isinstance(part, ModelMixin) else copy.deepcopy(part) for name, part in pipeline.components.items()}
    for name in ("text_encoder", "text_encoder_2"):
        parts[name].half()
    type(pipeline)(**parts).save_pretrained(folder)
