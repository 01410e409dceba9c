"""Fresh, untrained models of real architectures in sizes that suit 32 px pictures, and tokenizers that are built without any download."""

import json

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from fastvideo.models.families import FAMILIES
from fastvideo.models.families.text_encoders import CLIP_L, T5_XXL
from shapes.world import SIZE, all_specs, caption

TEXT_LENGTH = 16  # tokens; the longest caption needs 10


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE as CLIP has it, with merges learned from the captions: their words are single tokens, other text falls to bytes."""
    standard = CLIPTokenizer()._tokenizer
    learner = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = standard.normalizer, standard.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([caption(spec) for spec in all_specs()], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"]
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # a byte that ends a word must have a token as well
        vocab.setdefault(letter + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], model_max_length=TEXT_LENGTH)


def t5_tokenizer(captions: list[str] | None = None) -> T5Tokenizer:
    """A unigram model whose pieces are the words of `captions` (by default of all pictures') and, for other text, single characters."""
    words = sorted({word for text in captions or map(caption, all_specs()) for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """0.35 M parameters: a text encoder (64 wide, 2 layers), a vision encoder (96 wide, 3 layers, patches of 8 px), 64-d embeddings."""
    text = CLIP_L.tiny | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def clip_image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing, for 32 px pictures."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """0.09 M parameters, 64 wide. FLUX gives all text tokens one position, so what it knows of their order comes from here."""
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5_XXL.tiny))


def image_vae() -> AutoencoderKL:
    """0.24 M parameters: 3 x 32 x 32 pictures to 4 x 8 x 8 latents."""
    return AutoencoderKL(**FAMILIES["sd"].vae.tiny)


def flux_transformer() -> FluxTransformer2DModel:
    """1.17 M parameters; its 16 image tokens are 2 x 2 latents packed into 16 channels, as in FLUX.1."""
    return FluxTransformer2DModel(**FAMILIES["flux"].network.tiny)


def flow_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a rectified flow whose times are moved towards noise by `shift`."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)


def sd_unet() -> UNet2DConditionModel:
    """1.08 M parameters: Stable Diffusion's UNet with two levels, 8 x 8 and 4 x 4, and cross-attention to 64-d text in both."""
    return UNet2DConditionModel(**FAMILIES["sd"].network.tiny)


def sd_scheduler() -> PNDMScheduler:
    """Stable Diffusion v1.4's own."""
    return PNDMScheduler.from_config(FAMILIES["sd"].scheduler[1])


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
