"""Pictures: tensors in [-1, 1] to PIL images, and labelled grids."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from fastvideo.files import whole_file


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """images: (B, 3, H, W) in [-1, 1]; values outside are clipped. Returns B RGB images."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_grid(path: Path, rows: list[list[Image.Image]], labels: list[list[str]], min_side: int = 128) -> None:
    """Write a PNG with one row of pictures per entry of `rows`, each with its text from `labels` below it.

    Pictures smaller than `min_side` pixels are enlarged by a whole factor, without smoothing.
    """
    width, height = rows[0][0].size
    factor = max(1, -(-min_side // min(width, height)))
    width, height, text_height = width * factor, height * factor, 28
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (width + 4), len(rows) * (height + text_height)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
        for j, (image, label) in enumerate(zip(row, row_labels, strict=True)):
            x, y = j * (width + 4), i * (height + text_height)
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
            for line, text in enumerate(_wrap(label, width // 6)[:2]):
                draw.text((x + 2, y + height + 12 * line), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        grid.save(temporary, format="PNG")


def _wrap(text: str, characters: int) -> list[str]:
    """Break at spaces into lines of at most `characters`, where words allow."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > characters:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
