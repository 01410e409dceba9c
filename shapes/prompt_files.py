"""The captions that RL trains and tests on: `python shapes/prompt_files.py` writes them to `shapes/prompts/`.

Of pictures (train.txt, heldout.txt): a small part of the world, 4 colours, single objects and "a A and a B". Held out are four of the
twelve single objects, among them every colour, and twelve of the pairs of objects; of a held-out pair neither order is trained on, and
no file has both orders.
Of clips (video_train.txt, video_heldout.txt): all that `VIDEO_SPECS` says, a third of it held out. The same captions with the image
that the clip begins with: i2v_train.jsonl, two images a caption, and i2v_heldout.jsonl, one.
GenEval's questions (geneval.jsonl), twelve of each of the six kinds, about the same four colours; no pair of them is in train.txt.
"""

import json
import sys
from itertools import combinations, permutations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script, from any folder

import numpy as np
import torch

from fastvideo.media import to_pil
from shapes import video
from shapes.geneval import questions
from shapes.video import FRAMES, MOTIONS, VIDEO_SPECS, VideoSpec, render_clips, tracks
from shapes.world import RL_COLOURS, SHAPES, Spec, caption

RL_THINGS = tuple(product(RL_COLOURS, SHAPES))
RL_SPECS = tuple(Spec(things) for number in (1, 2) for things in permutations(RL_THINGS, number))  # 12 singles, then 132 ordered pairs

HELDOUT_SINGLES = (("red", "triangle"), ("green", "square"), ("blue", "circle"), ("yellow", "triangle"))
HELDOUT_PAIRS = 12  # of the 66: with the 4 single objects, the same mix as the training prompts
TRAIN_PAIRS = 24  # of the other 54: few, so that a quarter of the training prompts are single objects, the easier task


def split(seed: int = 0) -> tuple[list[Spec], list[Spec]]:
    """Specs for training and held-out specs; pairs are drawn, each in a random order."""
    rng = np.random.default_rng(seed)
    unordered = list(combinations(RL_THINGS, 2))
    pairs = [Spec(unordered[i] if rng.random() < 0.5 else unordered[i][::-1]) for i in rng.permutation(len(unordered))]
    singles = [Spec((thing,)) for thing in RL_THINGS if thing not in HELDOUT_SINGLES]
    heldout_singles = [Spec((thing,)) for thing in HELDOUT_SINGLES]
    return singles + pairs[HELDOUT_PAIRS : HELDOUT_PAIRS + TRAIN_PAIRS], heldout_singles + pairs[:HELDOUT_PAIRS]


def split_video(seed: int = 0) -> tuple[list[VideoSpec], list[VideoSpec]]:
    """48 specs for training and 24 held-out ones, which have each object twice and each motion four times."""
    rng = np.random.default_rng(seed)
    things = [RL_THINGS[i] for i in rng.permutation(len(RL_THINGS))] * 2
    heldout = [VideoSpec(*thing, MOTIONS[i]) for turn, i in enumerate(rng.permutation(len(MOTIONS))) for thing in things[4 * turn :][:4]]
    return [spec for spec in VIDEO_SPECS if spec not in heldout], [spec for spec in VIDEO_SPECS if spec in heldout]


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))


def write_image_prompts(folder: Path, name: str, specs: list[VideoSpec], images_each: int, rng: np.random.Generator) -> None:
    """Write FOLDER/NAME.jsonl, prompts with images, and these to FOLDER/images: first frames of clips, with room to move as asked."""
    specs = [spec for spec in specs for _ in range(images_each)]
    first_frames = render_clips(specs, tracks(specs, FRAMES, rng), rng)[:, :, 0]
    rows = []
    for i, (spec, image) in enumerate(zip(specs, to_pil(torch.from_numpy(first_frames) * 2 - 1))):
        rows.append({"prompt": video.caption(spec), "image": f"images/{name}_{i:02d}.png"})
        image.save(folder / rows[-1]["image"])
    write_lines(folder / f"{name}.jsonl", [json.dumps(row) for row in rows])


def main() -> None:
    folder = Path(__file__).resolve().parent / "prompts"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, specs, video_specs, images_each in zip(("train", "heldout"), split(), split_video(), (2, 1)):
        write_lines(folder / f"{name}.txt", [caption(spec) for spec in specs])
        write_lines(folder / f"video_{name}.txt", [video.caption(spec) for spec in video_specs])
        write_image_prompts(folder, f"i2v_{name}", video_specs, images_each, rng)
    write_lines(folder / "geneval.jsonl", [json.dumps(row) for row in questions(RL_THINGS, split()[0])])


if __name__ == "__main__":
    main()
