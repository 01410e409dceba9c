"""Draw the README's gallery: pictures of several models before and after training, clips as their frames.

    python evaluate.py --model shapes/models/flux --checkpoints trained=RUN/export --prompts shapes/prompts/heldout.txt --rewards shapes \\
        --num_seeds 1 --save_pictures --output_dir EVALUATION
    python scripts/gallery.py docs/images/gallery.png "FLUX: what the prompt asks for=EVALUATION" "TITLE=EVALUATION" ...

Each EVALUATION gives a row before and a row after, of its first prompts with the first noise seed.
"""

import csv
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

from fastvideo.errors import UserError
from fastvideo.files import whole_file
from fastvideo.media import film_strip, font_of, read_video, wrap
from fastvideo.parallel import distributed

SIDE, CELLS, FRAMES, MARGIN = 96, 8, 4, 70  # pixels of a picture; pictures, or frames, in a row; frames of a clip; pixels left of them


def main() -> None:
    if len(sys.argv) < 3 or not all("=" in entry for entry in sys.argv[2:]):
        raise UserError("give a file and one or more TITLE=EVALUATION, such as gallery.png FLUX=runs/flux/gallery")
    output, *given = sys.argv[1:]
    blocks = [block(*entry.rsplit("=", 1)) for entry in given]
    gallery = Image.new("RGB", (MARGIN + CELLS * (SIDE + 2), sum(one.height for one in blocks)), "white")
    top = 0
    for one in blocks:
        gallery.paste(one, (0, top))
        top += one.height
    with whole_file(Path(output)) as path:
        gallery.quantize(256).save(path, format="PNG", optimize=True)
    print(f"{output}: {Path(output).stat().st_size / 1000:.0f} kB")


def block(title: str, evaluation: str) -> Image.Image:
    """A title, the two rows, and the prompts below them."""
    folder = Path(evaluation)
    if not (folder / "pictures").is_dir():
        raise UserError(f"{folder} has no pictures/: evaluate with --save_pictures")
    with (folder / "scores.csv").open(encoding="utf-8") as file:
        prompts = {int(row["prompt"]): row["text"] for row in csv.DictReader(file)}
    models = ["base", *sorted({path.name for path in (folder / "pictures").iterdir()} - {"base"})][:2]
    rows = [[shown(folder / "pictures" / model, number) for number in sorted(prompts)[:CELLS]] for model in models]
    small = font_of("a").font_variant(size=12)
    count = CELLS if rows[0][0].width == SIDE else CELLS // FRAMES
    captions = [wrap(prompts[number], small, rows[0][0].width - 4) for number in sorted(prompts)[:count]]
    bottom = 24 + 2 * (SIDE + 2)
    image = Image.new("RGB", (MARGIN + CELLS * (SIDE + 2), bottom + 15 * max(map(len, captions)) + 16), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 2), title, fill="black", font=font_of("a").font_variant(size=14))
    for row, (name, pictures) in enumerate(zip(("before", "after"), rows)):
        draw.text((4, 24 + row * (SIDE + 2) + SIDE // 2 - 8), name, fill="black", font=small)
        for column, picture in enumerate(pictures[:count]):
            image.paste(picture, (MARGIN + column * (picture.width + 2), 24 + row * (SIDE + 2)))
    for column, lines in enumerate(captions):
        draw.text((MARGIN + column * (rows[0][0].width + 2) + 2, bottom + 2), "\n".join(lines), fill="black", font=small, spacing=2)
    return image


def shown(folder: Path, number: int) -> Image.Image:
    """A prompt's picture, or the frames of its clip side by side."""
    (path,) = folder.glob(f"*/prompt{number:05d}_seed0_0.*")
    if path.suffix == ".png":
        return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    strip = film_strip(read_video(path)[None], FRAMES)[0]
    return strip.resize((FRAMES * (SIDE + 2) - 2, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    distributed.run(main)
