"""OCR score: the text that a prompt asks for in quotes, against the text that is read in the picture.

The reader is PP-OCRv4 (Chinese and English), whose weights are inside the package rapidocr-onnxruntime: requirements-ocr.txt.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastvideo.errors import UserError

MARKS = '"“”„‟«»「」『』'
STRAIGHT = str.maketrans({**dict.fromkeys(MARKS, '"'), **dict.fromkeys("‘’‚‛", "'"), **dict.fromkeys("–—", "-")})  # noqa: RUF001
# " and ” after a digit are inches where no quote has begun; so they are in `12 " wide`, but not in `number 7 "Ann"`
OPENING = r'(?:[“„‟«»「」『』]|(?<!\d)["”](?=\S)|(?<!\d)(?<!\d\s)["”])'
CLOSING = rf"(?:(?<!\s)[{MARKS}]|[{MARKS}](?!\w))"  # between a space and a letter a quote begins: the mark before was unpaired
DOUBLE_QUOTED = re.compile(f"{OPENING}([^{MARKS}]+){CLOSING}")
# an apostrophe is no quote: single quotes have no letter on their outer side and no space on their inner side
SINGLE_QUOTED = re.compile(r"(?<!\w)'(?=\S)(.+?)(?<=\S)'(?!\w)")


def load_ocr(
    path: str | None, device: torch.device, *, frames: int = 4, threads: int = 1
) -> Callable[[torch.Tensor, list[dict]], torch.Tensor]:
    """The reward: `similarity` of the read and the quoted text, in [0, 1], (B,). Takes no path.

    A clip has the mean of at most `frames` frames, evenly spread. The reader runs on the CPU, on any `device`: `threads` pictures at a
    time, each on one core. The reward raises UserError for prompts without text in quotes and for media that are not finite.
    """
    if path is not None:
        raise UserError(f"--rewards: ocr takes no path, but was given ocr={path}")
    if min(frames, threads) < 1:
        raise UserError(f"--rewards: ocr needs frames and threads of 1 or more, not frames={frames}, threads={threads}")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:  # this package, one that it needs, or a system library of theirs
        raise UserError(f"--rewards: ocr cannot import its reader ({error}): pip install --no-deps -r requirements-ocr.txt") from error
    reader = RapidOCR(det_limit_type="max", use_cls=False, intra_op_num_threads=1, inter_op_num_threads=1)
    pool = ThreadPoolExecutor(threads)

    def read(pixels: np.ndarray) -> str:
        found, _ = reader(pixels)
        return in_reading_order(found or [])

    @torch.no_grad()
    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        check_rows(rows)
        if not media.isfinite().all():  # 8 bits would hide it
            raise UserError("ocr was given media with values that are not finite")
        clips = media if media.ndim == 5 else media.unsqueeze(2)
        chosen = torch.linspace(0, clips.shape[2] - 1, min(clips.shape[2], frames)).round().long()
        pixels = (clips[:, :, chosen].float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = pixels.flip(1).permute(0, 2, 3, 4, 1).flatten(0, 1).cpu().numpy()  # blue, green, red, as the reader wants it
        texts = [text for row in rows for text in [quoted_text(row["prompt"])] * len(chosen)]
        scores = [similarity(text, seen) for text, seen in zip(texts, pool.map(read, pictures))]
        return torch.tensor(scores).view(len(rows), -1).mean(1)

    reward.check_rows = check_rows
    return reward


def check_rows(rows: Sequence[dict]) -> None:
    """Raise UserError, with the first, if there are prompts without text in quotes."""
    without = [row["prompt"] for row in rows if not normalise(quoted_text(row["prompt"]))]
    if without:
        raise UserError(
            f'ocr needs the text to draw in quotes, as in a sign that says "OPEN", but {len(without)} of {len(rows)} prompts have none, '
            f"the first of them {without[0]!r}"
        )


def quoted_text(prompt: str) -> str:
    """What stands in a prompt's quotes, straight or typographic, several joined by a space; single ones count if there are no double ones.

    "" if there is none. A mark of inches and an unpaired one are no quotes.
    """
    quotes = DOUBLE_QUOTED.findall(prompt) or SINGLE_QUOTED.findall(prompt.translate(STRAIGHT))
    return " ".join(quotes).translate(STRAIGHT)


def in_reading_order(found: list) -> str:
    """Texts of boxes, each (4 corners x, y; text; confidence), line by line from the top, and in a line from the left.

    A box is in the line above it if its middle is above the bottom of that line's first box.
    """
    lines: list[list[tuple[float, str]]] = []
    line_bottom = 0.0
    for corners, text, _ in sorted(found, key=lambda box: min(y for _, y in box[0])):
        left, top, bottom = min(x for x, _ in corners), min(y for _, y in corners), max(y for _, y in corners)
        if not lines or (top + bottom) / 2 > line_bottom:
            lines.append([])
            line_bottom = bottom
        lines[-1].append((left, text))
    return " ".join(text for line in lines for _, text in sorted(line))


def similarity(one: str, other: str) -> float:
    """1 - edit distance / length of the longer, of the normalised texts, in [0, 1]; 0 if one of them is empty."""
    one, other = normalise(one), normalise(other)
    return 1 - edit_distance(one, other) / max(len(one), len(other)) if one and other else 0.0


def normalise(text: str) -> str:
    """Without case, white space, accents (the reader hardly knows any), and Unicode's variants of characters, quotes and dashes."""
    letters = unicodedata.normalize("NFKD", text.translate(STRAIGHT)).casefold()
    return "".join(letter for letter in letters if not letter.isspace() and not unicodedata.combining(letter))


def edit_distance(one: str, other: str) -> int:
    """Least number of letters to insert, delete or replace that turns one text into the other."""
    row = list(range(len(other) + 1))  # distances of the part of `one` so far to every beginning of `other`
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, other_letter in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other_letter))
    return row[-1]
