"""Fresh, untrained HunyuanVideo and SkyReels-I2V models in sizes that suit clips of 32 px, with tokenizers built without any download."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from fastvideo.models.families import FAMILIES
from fastvideo.models.families.text_encoders import CLIP_L_77, LLAMA_3_8B
from shapes import video, world
from shapes.tiny_models import TEXT_LENGTH

LATENT_CHANNELS = 16
CLIP_LENGTH = CLIP_L_77.tiny["max_position_embeddings"]
CROP_START = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # 95 tokens of the prompt template come before the prompt
LLAMA_WORDS = (  # how Llama 3 splits text before it looks for tokens
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's: byte-level pairs, its split of text, its special tokens after all others, <|begin_of_text|> before the text.

    The words of the captions and of HunyuanVideo's prompt template are single tokens, as they are in Llama 3, so the template has as many
    tokens before the prompt as the pipeline crops; other text falls to bytes. It pads on the right, because HunyuanVideo masks text by its
    length.
    """
    begin, end, *_, pad = special = [f"<|{name}|>" for name in ("begin_of_text", "eot_id", "start_header_id", "end_header_id")] + ["<pad>"]
    texts = re.split("|".join(map(re.escape, special)), DEFAULT_PROMPT_TEMPLATE["template"].replace("{}", ""))
    texts += [world.caption(spec) for spec in world.all_specs()] + [video.caption(spec) for spec in video.VIDEO_SPECS]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(byte_level.alphabet())
    # More than it finds: it stops when every word is one token.
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        padding_side="right",
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """0.16 M parameters, 64 wide. HunyuanVideo skips the last two of the three layers."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            **LLAMA_3_8B.tiny,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip_text_encoder(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text half of the CLIP in `folder`, made to read `CLIP_LENGTH` tokens.

    The added positions are zeros. No caption reaches them: attention is causal, and the embedding is taken at the end of the text.
    """
    short = CLIPTextModel.from_pretrained(folder)
    weights = short.state_dict()
    config = CLIPTextConfig(**short.config.to_dict() | {"max_position_embeddings": CLIP_LENGTH})
    encoder = CLIPTextModel(config)
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    longer = torch.zeros(CLIP_LENGTH, config.hidden_size)
    longer[: len(weights[name])] = weights[name]
    encoder.load_state_dict(weights | {name: longer})
    return encoder, CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)


def video_vae() -> AutoencoderKLHunyuanVideo:
    """0.52 M parameters: clips of 3 x (4 k + 1) x 32 x 32 to latents of 16 x (k + 1) x 8 x 8.

    The first weights keep the variance, and the first posteriors are narrow: with PyTorch's own they begin as noise, and training takes
    four times as long.
    """
    vae = AutoencoderKLHunyuanVideo(**FAMILIES["hunyuan"].vae.tiny)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    log_variance = vae.quant_conv.weight[LATENT_CHANNELS:], vae.quant_conv.bias[LATENT_CHANNELS:]
    with torch.no_grad():
        log_variance[0].mul_(0.1)
        log_variance[1].fill_(-6)
    return vae


def hunyuan_transformer(family: str = "hunyuan") -> HunyuanVideoTransformer3DModel:
    """1.0 M parameters; 2 x 2 latents of one frame are a token: 48 for 9 frames, 16 for a picture. "skyreels" has twice the channels."""
    return HunyuanVideoTransformer3DModel(**FAMILIES[family].network.tiny)
