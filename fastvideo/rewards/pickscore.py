"""PickScore: which of two pictures people would pick for a prompt. Yuval Kirstain et al.: Pick-a-Pic, https://arxiv.org/abs/2305.01569."""

import torch

from fastvideo.errors import UserError
from fastvideo.rewards import Reward
from fastvideo.rewards.clip import cosine_reward, load_clip_folder


def load_pickscore(path: str | None, device: torch.device, *, processor: str = "", dtype: str = "float32") -> Reward:
    """The reward: the cosine times the model's learnt scale (100), as its authors give it, (B,); about 15 to 25 of real pictures.

    path: the folder of yuvalkirstain/PickScore_v1. processor: the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where that has no
    tokenizer. dtype: as of `load_clip`.
    """
    if path is None:
        raise UserError("--rewards: pickscore needs a folder, written as pickscore=FOLDER")
    model, tokenize, prepare = load_clip_folder("pickscore", path, processor)
    scale = model.logit_scale.exp().item()  # before bfloat16 makes 100 to 99 or 102
    return cosine_reward("pickscore", model, tokenize, prepare, device, dtype, scale)
