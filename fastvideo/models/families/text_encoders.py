"""Text encoders that several models have.

One may be made from another: `Part(class, CLIP_L.published | {...}, CLIP_L.tiny | {...}, CLIP_L.tokenizer)`.
"""

from fastvideo.models.families.family import Part

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TINY_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64}
CLIP_L = Part("CLIPTextModel", _CLIP_L, _TINY_CLIP | {"max_position_embeddings": 16}, "sd/tokenizer")
# Some pipelines pad to 77 tokens, whatever the tokenizer says.
CLIP_L_77 = Part("CLIPTextModel", _CLIP_L, _TINY_CLIP | {"max_position_embeddings": 77}, "hunyuan/tokenizer_2")

_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_TINY_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
}
_TINY_T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
T5_XXL = Part("T5EncoderModel", _T5_XXL | {"vocab_size": 32128}, _TINY_T5, "flux/tokenizer_2")
UMT5_XXL = Part("UMT5EncoderModel", _T5_XXL | {"vocab_size": 256384}, _TINY_T5, "wan/tokenizer")

LLAMA_3_8B = Part(
    "LlamaModel",
    {"vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8},
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    },
    "hunyuan/tokenizer",
)
