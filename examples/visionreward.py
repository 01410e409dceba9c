"""VisionReward-Video: a vision-language model answers a list of yes/no questions about a clip, and the answers are weighed.

Jiazheng Xu et al., https://arxiv.org/abs/2412.21059. A reward of one's own (docs/rewards.md), made for a reward server in an environment of
its own, since the published model needs an old transformers:

    python -m fastvideo.rewards.server --rewards \
        examples/visionreward.py:visionreward=models/VisionReward-Video,questions=QUESTIONS.txt,weights=weight.json,remote_code=1
    python evaluate.py ... --benchmarks visionreward=prompts.txt,server=http://127.0.0.1:8500,send=uint8

The score is the mean over the questions of weight x probability of "yes": the released inference-video.py has 1 and -1 in place of the
probability, and the paper of DanceGRPO reports "the weighted sum of the probability". With the published weights it is in [0, 0.216].
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from fastvideo.errors import UserError
from fastvideo.media import to_pil
from fastvideo.parallel.distributed import compute_dtype

MAX_FRAMES = 24  # as released
YES, NO = ("yes", "Yes"), ("no", "No")


def visionreward(
    path: str | None,
    device: torch.device,
    *,
    questions: str = "",
    weights: str = "",
    clip_fps: float = 24.0,
    remote_code: bool = False,
    dtype: str = "auto",
) -> Callable[[torch.Tensor, list[dict]], torch.Tensor]:
    """The reward: (B,) of clips (B, 3, frames, H, W).

    path: the model's folder. questions: a file with one question a line, in which [[prompt]] stands for the clip's prompt.
    weights: a JSON list of as many numbers. clip_fps: frames a second of the clips; the model is shown one of each second.
    remote_code: 1 for VisionReward-Video itself (CogVLM2-Video), whose code is in its folder and is run; 0 for a model that transformers
        knows by AutoModelForImageTextToText, with a chat template, which is shown the frames as pictures.
    dtype: "float32", "bfloat16", or "auto", which is bfloat16 on a GPU.
    """
    if path is None or not Path(path).is_dir():
        raise UserError(f"visionreward needs the folder of a model, written as visionreward=FOLDER, not {path}")
    if not 0 < clip_fps < math.inf or dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"visionreward needs clip_fps above 0 and dtype auto, float32 or bfloat16, not {clip_fps} and {dtype}")
    asked, weighed = read_questions(questions, weights)
    model, tokenizer, inputs_of = (load_cogvlm2 if remote_code else load_chat)(path, device, compute_dtype(dtype, device))
    model.to(device).eval().requires_grad_(False)
    yes, no = ([tokenizer.encode(word, add_special_tokens=False)[0] for word in words] for words in (YES, NO))
    if set(yes) & set(no):
        raise UserError(f"visionreward={path}: its tokenizer begins yes and no with the same token")

    def probability(frames: torch.Tensor, question: str) -> float:
        """Of "yes" as the first word of the answer, among yes and no, of either spelling."""
        logits = model(**inputs_of(frames, question)).logits[0, -1].float()
        return torch.sigmoid(logits[yes].logsumexp(0) - logits[no].logsumexp(0)).item()

    @torch.no_grad()
    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        if media.ndim != 5:
            raise UserError(f"visionreward scores clips (B, 3, frames, H, W), not pictures of shape {tuple(media.shape)}")
        shown = media[:, :, frames_of_seconds(media.shape[2], clip_fps)]
        shown = (shown.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # as a file has them
        answers = [
            [probability(frames, question.replace("[[prompt]]", row["prompt"])) for question in asked] for frames, row in zip(shown, rows)
        ]
        return torch.tensor(answers, dtype=torch.float64) @ weighed / len(asked)

    return reward


def read_questions(questions: str, weights: str) -> tuple[list[str], torch.Tensor]:
    """The questions, with the line breaks at their ends, which the released code leaves there; and their weights."""
    try:
        asked = [line for line in Path(questions).read_text(encoding="utf-8").splitlines(keepends=True) if line.strip()]
        weighed = torch.tensor(json.loads(Path(weights).read_bytes()), dtype=torch.float64)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"visionreward: questions={questions} or weights={weights} can't be read: {error}") from error
    if weighed.shape != (len(asked),) or not asked or not weighed.isfinite().all():
        raise UserError(f"visionreward: {questions} has {len(asked)} questions, and {weights} no list of as many finite numbers")
    return asked, weighed


def frames_of_seconds(frames: int, clip_fps: float) -> list[int]:
    """The frames nearest to the clip's whole seconds, as the released code takes them: of 53 at 24 a second the 1st, 25th and 49th."""
    seconds = round((frames - 1) / clip_fps) + 1
    return [min(range(frames), key=lambda i: abs(i / clip_fps - second)) for second in range(min(seconds, MAX_FRAMES))]


def load_chat(path: str, device: torch.device, dtype: torch.dtype) -> tuple:
    """Model, tokenizer, and a function from frames (3, frames, H, W) uint8 and a question to the model's arguments."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)

    def inputs_of(frames: torch.Tensor, question: str) -> dict:
        pictures = [{"type": "image", "image": picture} for picture in to_pil(frames.transpose(0, 1) / 127.5 - 1)]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        return inputs.to(device, dtype)  # whole numbers stay so

    return model, processor.tokenizer, inputs_of


def load_cogvlm2(path: str, device: torch.device, dtype: torch.dtype) -> tuple:
    """The same of CogVLM2-Video, called as in the released inference-video.py."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, trust_remote_code=True, local_files_only=True)

    def inputs_of(frames: torch.Tensor, question: str) -> dict:
        parts = model.build_conversation_input_ids(
            tokenizer=tokenizer, query=question, images=[frames.cpu()], history=[], template_version="chat"
        )
        inputs = {name: parts[name][None].to(device) for name in ("input_ids", "token_type_ids", "attention_mask")}
        return inputs | {"images": [[parts["images"][0].to(device, dtype)]]}

    return model, tokenizer, inputs_of
