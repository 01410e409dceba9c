"""Pictures and clips: tensors in [-1, 1] to PIL images, labelled grids, film strips, and mp4 files out and in."""

from bisect import bisect_right
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastvideo.errors import UserError
from fastvideo.files import whole_file

LINES = 5  # of text below a picture


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as it was opened in RGB: turned as its EXIF data says, laid on white where it is transparent, 16-bit grey scaled to 8 bits.

    Raises ValueError for pixels of 32 bits, whole or floating: what is white in them is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would cut off what is above 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and what is white in them is not known: save it with 8 or 16")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """images: (B, 3, H, W) in [-1, 1]; values outside are clipped. Returns B RGB images."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def film_strip(clips: torch.Tensor, most: int = 6) -> list[Image.Image]:
    """clips: (B, 3, frames, H, W) in [-1, 1]. Returns B RGB images, each of a clip's frames side by side: at most `most`, evenly spread."""
    chosen = torch.linspace(0, clips.shape[2] - 1, min(clips.shape[2], most)).round().long().tolist()
    strips = F.pad(clips[:, :, chosen].float(), (0, 1), value=1)  # a white line to the right of each frame
    return to_pil(strips.transpose(2, 3).flatten(3))


def save_video(path: Path, clip: torch.Tensor, fps: float) -> None:
    """Write a clip (3, frames, H, W) in [-1, 1] as an H.264 mp4; values outside are clipped.

    The colours of 2 x 2 pixels are stored as one, so sizes are even: an odd one grows by a pixel, a copy of the last row or column.
    """
    import imageio.v3 as imageio

    frames = F.pad(clip.float().transpose(0, 1), (0, clip.shape[3] % 2, 0, clip.shape[2] % 2), mode="replicate")
    frames = [np.asarray(frame) for frame in to_pil(frames)]
    encoder = {"codec": "libx264", "quality": None, "macro_block_size": 1, "output_params": ["-crf", "12"]}  # hardly any visible loss
    with whole_file(path) as temporary:
        temporary.write_bytes(imageio.imwrite("<bytes>", frames, extension=".mp4", plugin="FFMPEG", fps=fps, **encoder))


def read_video(path: Path) -> torch.Tensor:
    """All frames of a video file: (3, frames, H, W) float32 in [-1, 1]. Raises UserError for a missing file, and for one that is broken."""
    if not path.is_file():
        raise UserError(f"there is no video {path}")
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        frames = reader.get_batch(range(len(reader))).asnumpy()
    except Exception as error:  # RuntimeError or DECORDError, by where in the file the damage is
        raise UserError(f"the video {path} cannot be read: {str(error).splitlines()[0]}") from error
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def save_grid(path: Path, rows: list[list[Image.Image]], labels: list[list[str]]) -> None:
    """Write a PNG with one row of pictures per entry of `rows`, each with its text from `labels` below it, as far as `LINES` hold it.

    The labels stand whole in a .txt beside it, a line each, row after row. Where no font has all characters of one, that line's number
    is below the picture. Pictures under 192 pixels wide or 128 high are enlarged by a whole factor, without smoothing.
    """
    width, height = rows[0][0].size
    factor = max(1, -(-192 // width), -(-128 // height))
    width, height = width * factor, height * factor
    size, lines, texts = max(14, min(width, height) // 24), [], []
    for label in (label for row in labels for label in row):
        lines.append(" ".join(label.split()))
        text = lines[-1] if font_of(lines[-1]) else f"line {len(lines)} of {path.stem}.txt"
        font = font_of(text).font_variant(size=size)
        texts.append((font, wrap(text, font, width - 4)))
    columns, text_height = max(len(row) for row in rows), max(len(wrapped) for _, wrapped in texts) * size * 5 // 4 + 8
    grid = Image.new("RGB", (columns * (width + 4), len(rows) * (height + text_height)), "white")
    draw, texts = ImageDraw.Draw(grid), iter(texts)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            left, top = x * (width + 4), y * (height + text_height)
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
            font, wrapped = next(texts)
            for i, line in enumerate(wrapped):
                draw.text((left + 2, top + height + 2 + i * size * 5 // 4), line, fill="black", font=font)
    with whole_file(path) as temporary:
        grid.save(temporary, format="PNG")
    with whole_file(path.with_suffix(".txt")) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def save_samples(path: Path, media: torch.Tensor, labels: list[str], fps: int = 8) -> Path:
    """Write a PNG of labelled samples at `path`, which is returned. media: pictures (B, 3, H, W), four a row, or clips (B, 3, F, H, W).

    A clip is a row of its frames, and is written as an mp4 beside the PNG too: `NAME_0.mp4`, `NAME_1.mp4`, ...
    """
    is_video, columns = media.ndim == 5, 1 if media.ndim == 5 else 4
    images = film_strip(media) if is_video else to_pil(media)
    starts = range(0, len(images), columns)
    save_grid(path, [images[i : i + columns] for i in starts], [labels[i : i + columns] for i in starts])
    for i, clip in enumerate(media if is_video else []):
        save_video(path.with_name(f"{path.stem}_{i}.mp4"), clip, fps)
    return path


def font_of(text: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has each character of `text`: DejaVu Sans, which comes with matplotlib, or one of Noto Sans that is installed."""
    from matplotlib import font_manager

    fonts = sorted(font.fname for font in font_manager.fontManager.ttflist if font.name.startswith("Noto Sans") and font.weight == 400)
    files = (file for file in (font_manager.findfont("DejaVu Sans"), *fonts) if _characters(file).issuperset(map(ord, text)))
    return next((ImageFont.truetype(file, 14) for file in files), None)


@cache
def _characters(font: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font).get_charmap())


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most `LINES` lines of `width` pixels, broken at spaces where words allow; an ellipsis stands for what does not fit."""
    lines = []
    while font.getlength(text) > width and len(lines) < LINES:
        room = width - (font.getlength("…") if len(lines) == LINES - 1 else 0)
        end = max(1, bisect_right(range(len(text)), room, key=lambda characters: font.getlength(text[:characters])) - 1)
        end = max(text.rfind(" ", 0, end + 1), 0) or end
        lines.append(text[:end])
        text = text[end:].lstrip()
    return [*lines, text] if len(lines) < LINES else [*lines[:-1], f"{lines[-1]}…"]
