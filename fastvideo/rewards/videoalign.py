"""VideoAlign (KwaiVGI/VideoReward): visual quality, motion quality and text alignment of a clip as people would rate them.

Qwen2-VL-2B reads frames of the clip and a request for three ratings; a linear head reads each rating off the hidden state at a token of its
own. One loaded model and one forward pass a batch serve all three rewards.
"""

import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from fastvideo.errors import UserError, launch_rank
from fastvideo.media import save_video
from fastvideo.parallel.distributed import compute_dtype
from fastvideo.rewards.videoalign_checkpoint import HEADS, REWARD_TOKENS, load_checkpoint

# The words of training, from VideoAlign's prompt_template.py (MIT license, Copyright (c) 2025 Kling Team, Kuaishou Technology):
# a change of a single space changes the scores.
REQUEST = (Path(__file__).parent / "videoalign_prompt.txt").read_text(encoding="utf-8")
CHAT = (  # of Qwen2-VL, as far as the answer that never comes
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{request}<|im_end|>\n<|im_start|>assistant\n"
)
VIDEO_TOKEN = "<|video_pad|>"
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels of a patch's side, patches of a token's side, frames of a patch
MIN_FRAMES, MAX_FRAMES = 4, 768
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_loaded: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # folder, device and options -> VideoAlign, while a reward uses it


def _loader(head: str) -> Callable:
    def load(
        path: str | None,
        device: torch.device,
        *,
        base: str = "",
        clip_fps: float = 24.0,
        fps: float = 0.0,
        max_frame_pixels: int = 0,
        min_frame_pixels: int = 128 * 28 * 28,
        norm: int = 1,
        dtype: str = "auto",
        save_videos: str = "",
    ) -> Callable[[torch.Tensor, list[dict]], torch.Tensor]:
        """The reward: one of VideoAlign's ratings, (B,).

        path: folder with model_config.json and checkpoint-N/.
        base: folder of Qwen2-VL-2B-Instruct; by default the folder of that name inside or beside `path`.
        clip_fps: frames a second of the clips that are scored.
        fps: frames a second that the model is shown; 0 for model_config.json's.
        max_frame_pixels, min_frame_pixels: a frame is enlarged or reduced to lie between; 0 for model_config.json's maximum.
        norm: 1 for (rating - mean) / std with model_config.json's mean and std, as the released inference does, 0 for the rating itself.
        dtype: "auto", "float32" or "bfloat16".
        save_videos: folder in which every scored clip is kept as an mp4, with its rating and prompt in a jsonl file beside.
        """
        name = f"videoalign.{head.lower()}"
        if path is None or not Path(path).is_dir():
            found = "no folder was given" if path is None else f"there is no folder {path}"
            raise UserError(f"--rewards: {name} needs a VideoAlign checkpoint, written as {name}=FOLDER, but {found}")
        if clip_fps <= 0 or fps < 0 or max_frame_pixels < 0 or min_frame_pixels < 0 or norm not in (0, 1):
            raise UserError(f"--rewards: {name}={path} has an option out of range: clip_fps > 0, norm 0 or 1, the other numbers >= 0")
        if dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--rewards: {name}={path}: dtype is {dtype!r}, but must be auto, float32 or bfloat16")
        key = (Path(path).resolve(), device, base, clip_fps, fps, max_frame_pixels, min_frame_pixels, dtype)
        model = _loaded.get(key)
        if model is None:
            _loaded[key] = model = VideoAlign(*key)
        mean, std = model.mean_and_std(head) if norm else (0.0, 1.0)

        @torch.no_grad()
        def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
            ratings = (model.rating(head, media, [row["prompt"] for row in rows]) - mean) / std
            if save_videos:
                keep_clips(Path(save_videos), name, media, rows, ratings, clip_fps)
            return ratings

        reward.check_rows = model.check_rows
        return reward

    return load


load_videoalign_vq, load_videoalign_mq, load_videoalign_ta = (_loader(head) for head in HEADS)


def keep_clips(folder: Path, name: str, clips: torch.Tensor, rows: list[dict], ratings: torch.Tensor, fps: float) -> None:
    """Write clips (B, 3, frames, H, W) to `folder`, and a line for each to its NAME_RANK.jsonl. Later ones never replace earlier ones."""
    log = folder / f"{name}_{launch_rank():05d}.jsonl"
    number = len(log.read_text().splitlines()) if log.exists() else 0
    for i, (clip, row, rating) in enumerate(zip(clips, rows, ratings.tolist())):
        path = folder / f"{log.stem}_{number + i:07d}.mp4"
        save_video(path, clip, fps)
        with log.open("a") as file:
            file.write(json.dumps({"file": path.name, "rating": rating, "prompt": row["prompt"]}) + "\n")


class VideoAlign:
    """The loaded model with its settings. See `_loader` for what they mean."""

    def __init__(self, folder, device, base, clip_fps, fps, max_frame_pixels, min_frame_pixels, dtype):
        self.folder, self.device, self.clip_fps = folder, device, clip_fps
        self.model, self.head, self.tokenizer, self.settings = load_checkpoint(folder, base, device, compute_dtype(dtype, device))
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(REWARD_TOKENS)
        self.fps = fps or self.settings["data_config"]["fps"]
        self.min_frame_pixels = min_frame_pixels
        self.max_frame_pixels = max_frame_pixels or self.settings["data_config"]["max_frame_pixels"]
        self._media: weakref.ref = lambda: None
        self._prompts: list[str] = []
        self._left: dict[str, torch.Tensor] = {}

    def mean_and_std(self, head: str) -> tuple[float, float]:
        known = self.settings.get("inference_config")
        mean, std = (known.get(f"{head}_{name}") if isinstance(known, dict) else None for name in ("mean", "std"))
        path = self.folder / "model_config.json"
        if mean is None or std is None:
            raise UserError(f"--rewards: {path} has no inference_config with {head}_mean and {head}_std: add norm=0")
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in (mean, std)) or std <= 0:
            raise UserError(
                f"--rewards: {path}: {head}_mean and {head}_std are {mean!r} and {std!r}, but must be finite numbers, the second above 0"
            )
        return mean, std

    def rating(self, head: str, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """One head's ratings (B,) of clips (B, 3, frames, H, W), from the forward pass that the other heads' calls share.

        A rating is given out once: who asks again gets a fresh one, in case the tensor has been written to.
        """
        if head not in self._left or self._media() is not media or self._prompts != prompts:
            self._left = dict(zip(HEADS, self.ratings(media, prompts).unbind(1)))
            self._media, self._prompts = weakref.ref(media), prompts
        return self._left.pop(head)

    def ratings(self, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Clips (B, 3, frames, H, W) in [-1, 1] -> (B, 3) float32, as HEADS, not normalised."""
        if media.ndim != 5:
            raise UserError(f"VideoAlign scores clips (B, 3, frames, H, W), not pictures of shape {tuple(media.shape)}")
        frames = sample_frames(media.shape[2], self.clip_fps, self.fps).to(media.device)
        height, width = frame_size(*media.shape[3:], self.min_frame_pixels, self.max_frame_pixels)
        video = resize(media[:, :, frames].to(self.device), height, width)
        grid = torch.tensor([[len(frames) // FRAMES, height // PATCH, width // PATCH]] * len(media), device=self.device)
        tokens = self.tokenize(prompts, grid[0].prod().item() // MERGE**2)
        hidden = self.model(
            **tokens,
            # one position a token on all three axes: it was trained without Qwen2-VL's positions in time, height and width
            position_ids=torch.arange(tokens["input_ids"].shape[1], device=self.device).expand(3, *tokens["input_ids"].shape),
            pixel_values_videos=patchify(video),
            video_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return torch.stack([F.linear(hidden[tokens["input_ids"] == token].float(), self.head)[:, 0] for token in self.reward_ids], 1)

    def check_rows(self, rows: Sequence[dict]) -> None:
        """Raise UserError, with the first, if there are prompts with the model's own tokens in them."""
        own = list(self.tokenizer.get_added_vocab())
        found = [(row["prompt"], token) for row in rows for token in own if token in row["prompt"]]
        if found:
            number, (prompt, token) = len({prompt for prompt, _ in found}), found[0]
            raise UserError(
                f"VideoAlign can't score {number} of {len(rows)} prompts, which have words of the model's own in them, "
                f"the first of them {prompt!r} with {token!r}"
            )

    def tokenize(self, prompts: list[str], video_tokens: int) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (B, longest), padded on the right."""
        self.check_rows([{"prompt": prompt} for prompt in prompts])
        texts = [CHAT.format(video=VIDEO_TOKEN * video_tokens, request=REQUEST.format(text_prompt=prompt)) for prompt in prompts]
        return dict(self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device))


def sample_frames(frames: int, clip_fps: float, fps: float) -> torch.Tensor:
    """Which of a clip's frames the model is shown: evenly spread, the first and the last among them; an even number, at least 4 if there
    are as many. Raises UserError for a clip of one frame."""
    if frames < FRAMES:
        raise UserError(f"VideoAlign needs clips of at least {FRAMES} frames, but got {frames}")
    count = min(max(frames / clip_fps * fps, MIN_FRAMES), min(frames, MAX_FRAMES) // FRAMES * FRAMES)
    return torch.linspace(0, frames - 1, round(count / FRAMES) * FRAMES).round().long()


def frame_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to show frames at: multiples of 28, at about the same aspect ratio, with min_pixels <= height * width <= max_pixels."""
    unit = PATCH * MERGE
    new_height, new_width = (max(unit, round(size / unit) * unit) for size in (height, width))
    if new_height * new_width > max_pixels:
        factor = math.sqrt(height * width / max_pixels)
        return math.floor(height / factor / unit) * unit, math.floor(width / factor / unit) * unit
    if new_height * new_width < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * factor / unit) * unit, math.ceil(width * factor / unit) * unit
    return new_height, new_width


def resize(clips: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 3, frames, H, W) in [-1, 1] -> (B, frames, 3, height, width), resized and normalised, of 8 bits in between as files have them."""
    batch, _, frames = clips.shape[:3]
    video = (clips.transpose(1, 2).flatten(0, 1).float() * 127.5 + 127.5).round().clamp(0, 255)
    video = F.interpolate(video, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
    mean, std = (torch.tensor(values, device=clips.device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((video - mean) / std).unflatten(0, (batch, frames))


def patchify(video: torch.Tensor) -> torch.Tensor:
    """(B, frames, 3, H, W) -> (patches, values): each patch has 3 x 2 frames x 14 x 14 values; the 2 x 2 patches of a token are neighbours,
    tokens go by rows, then pairs of frames, then clips."""
    batch, frames, channels, height, width = video.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    blocks = video.view(batch, frames // FRAMES, FRAMES, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, channels * FRAMES * PATCH**2)
