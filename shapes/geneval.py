"""GenEval in the shapes world: the checker as its detector, and its six kinds of questions about captions of this world.

A class is a shape. What a question does not ask for may be otherwise, as in GenEval: of "a red circle", "single_object" asks for a circle.
"""

from itertools import combinations

import numpy as np
import torch
from PIL import Image

from fastvideo.rewards.detectors import Detection, Detector
from shapes.checker import detect as find_objects
from shapes.world import COLOURS, COUNTS, RELATIONS, SHAPES, Spec, caption, extent

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def load_detector(path: None, device: torch.device) -> Detector:
    """The checker's objects whose shape and colour it recognises. A box is that of the ideal shape of the same place and area.

    The better formed are the more certain, and all are certain enough to be counted: scores are between 0.9 and 1.
    """

    def detect(pictures: list[Image.Image]) -> list[list[Detection]]:
        images = np.stack([np.asarray(picture, np.float32) for picture in pictures]).transpose(0, 3, 1, 2) / 255
        return [[as_detection(one) for one in found if one.shape and one.colour] for found in find_objects(images)]

    detect.classes, detect.colours = set(SHAPES), tuple(COLOURS)
    return detect


def as_detection(one) -> Detection:
    """Of a `shapes.checker.Detection`."""
    side, up, down = extent(one.shape, np.sqrt(one.area / np.pi))
    box = (one.x - side, one.y - up, one.x + side, one.y + down)
    return Detection(one.shape, 0.9 + 0.1 * one.overlap, box, colour=one.colour)


def question(kind: str, spec: Spec) -> dict:
    """A row of evaluation_metadata.jsonl that asks a question of `kind` about `spec`; of two objects, they have two shapes."""
    include = [{"class": shape, "count": 1} for _, shape in spec.objects]
    if kind in ("colors", "color_attr"):
        include = [entry | {"color": colour} for entry, (colour, _) in zip(include, spec.objects)]
    if kind == "counting":
        include = [include[0] | {"count": len(include)}]
    if kind == "position":  # the second object comes first, and is what the first one's place is seen from
        include = [include[1], include[0] | {"position": [spec.relation, 0]}]
    row = {"tag": kind, "include": include}
    if kind == "counting":
        row["exclude"] = [include[0] | {"count": include[0]["count"] + 1}]
    return row | {"prompt": caption(spec)}


def questions(things: tuple[tuple[str, str], ...], used: list[Spec], each: int = 12, seed: int = 0) -> list[dict]:
    """Rows of the six kinds, `each` of a kind, about `things`, (colour, shape). Two objects differ in colour and in shape, and no pair of
    `used` is asked for, in either order."""
    rng = np.random.default_rng(seed)
    known = {frozenset(spec.objects) for spec in used}
    pairs = [
        (one, other) if rng.random() < 0.5 else (other, one)
        for one, other in combinations(things, 2)
        if one[0] != other[0] and one[1] != other[1] and frozenset((one, other)) not in known
    ]
    singles = [Spec((thing,)) for thing in things]
    several = [Spec((thing,) * number) for number in COUNTS.values() for thing in things]
    specs = {
        "single_object": singles,
        "two_object": [Spec(pair) for pair in pairs],
        "counting": several,
        "colors": singles,
        "position": [Spec(pair, relation) for pair in pairs for relation in RELATIONS],
        "color_attr": [Spec(pair) for pair in pairs],
    }
    return [question(kind, specs[kind][i]) for kind in KINDS for i in rng.permutation(len(specs[kind]))[:each]]
