"""The captions that RL trains and tests on: `python shapes/prompt_files.py` writes `shapes/prompts/train.txt` and `heldout.txt`.

They are a small part of the world: 4 colours, single objects and "a A and a B". Held out are four of the twelve single objects, among
them every colour, and twelve of the pairs of objects; of a held-out pair neither order is trained on, and no file has both orders.
"""

import sys
from itertools import combinations, permutations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script, from any folder

import numpy as np

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


def main() -> None:
    folder = Path(__file__).resolve().parent / "prompts"
    folder.mkdir(exist_ok=True)
    for name, specs in zip(("train", "heldout"), split()):
        (folder / f"{name}.txt").write_text("".join(caption(spec) + "\n" for spec in specs))


if __name__ == "__main__":
    main()
