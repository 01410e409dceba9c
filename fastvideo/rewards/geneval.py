"""GenEval: does a picture have the objects that were asked for, as many, of these colours, and where they should be?

Dhruba Ghosh et al., https://arxiv.org/abs/2310.11513. Rules and numbers are those of its evaluation/evaluate_images.py at commit 16f1681
(github.com/djghosh13/geneval); the rows are those of its prompts/evaluation_metadata.jsonl. What the rows may say:

    tag: the kind of question. Scores of detections must be above 0.3, in questions of the tag "counting" above 0.9.
    include: what there must be, all of it. "class" and "count": at least as many, of which the most certain ones are taken. "color": all of
        these have it. "position": each of these is "left of", "right of", "above" or "below" each of those taken for an earlier entry.
    exclude: what there must not be: "count" or more of "class".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.media import to_pil
from fastvideo.rewards import Reward
from fastvideo.rewards.detectors import Detection, Detector, load_detector
from fastvideo.rewards.geneval_colours import COLOURS, ColourNames

RELATIONS = ("left of", "right of", "above", "below")
# GenEval's names of COCO's classes, and the names that detectors have for them: COCO's own, and those of PASCAL VOC
ALIASES = {
    "computer mouse": ("mouse",),
    "tv remote": ("remote",),
    "computer keyboard": ("keyboard",),
    "airplane": ("aeroplane",),
    "motorcycle": ("motorbike",),
    "couch": ("sofa",),
    "potted plant": ("pottedplant",),
    "dining table": ("diningtable",),
    "tv": ("tvmonitor",),
}


@dataclass(frozen=True)
class Rules:
    """The numbers of the rules, as of evaluate_images.py's --options: see `load_geneval`."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


def load_geneval(
    path: str | None,
    device: torch.device,
    *,
    clip: str = "",
    weights: str = "",
    side: int = 0,
    batch: int = 8,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_objects: int = 16,
    max_overlap: float = 1.0,
    position_threshold: float = 0.1,
) -> Reward:
    """The reward: 1 for a correct picture, else 0, (B,).

    path, weights, side: the detector and its options, as `load_detector` takes them (GenEval: mmdetection's Mask2Former, side 800).
    clip: a CLIP model, as of the reward `clip`, which names colours (GenEval: OpenAI's ViT-L-14). batch: pictures detected at once.
    threshold, counting_threshold: scores of detections are above it. max_objects: the most certain ones of a class count.
    max_overlap: of those, none that overlaps a more certain one by this intersection over union or more; 1 keeps all.
    position_threshold: offsets count as far as they are larger than this share of both objects' sizes.
    """
    if path is None:
        raise UserError("--rewards: geneval needs a detector, written as geneval=shapes, geneval=FOLDER or geneval=FILE.py:FUNCTION")
    if batch < 1 or max_objects < 1 or side < 0:
        raise UserError(
            f"--rewards: geneval needs batch and max_objects of 1 or more and side of 0 or more, not {batch}, {max_objects}, {side}"
        )
    rules = Rules(threshold, counting_threshold, max_objects, max_overlap, position_threshold)
    detect = load_detector(path, device, weights or None, side, min(threshold, counting_threshold))
    name_colours = ColourNames(clip, device) if clip else None

    @torch.no_grad()
    def reward(media: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        if media.ndim != 4:
            raise UserError(f"geneval scores pictures (B, 3, H, W), not clips of shape {tuple(media.shape)}")
        check_rows(rows)
        pictures = to_pil(media)
        found = [one for start in range(0, len(rows), batch) for one in detect(pictures[start : start + batch])]
        if len(found) != len(rows):
            raise UserError(f"geneval's detector {path} returned {len(found)} lists for {len(rows)} pictures")
        return torch.tensor(
            [
                float(correct(row, objects, rules, lambda *taken, picture=picture: _colours(*taken, picture, name_colours)))
                for row, objects, picture in zip(rows, found, pictures, strict=True)
            ]
        )

    def check_rows(rows: Sequence[dict]) -> None:
        check(rows, detect, bool(clip))

    reward.check_rows = check_rows
    return reward


def correct(row: dict, found: list[Detection], rules: Rules, colours_of: Callable[[list[Detection], str], list[str]]) -> bool:
    """Whether `found` in a picture is what `row` asks for. colours_of: the colours of objects of a class, called where they matter."""
    taken: list[list[Detection]] = []  # for each entry of "include"
    counting = row["tag"] == "counting"
    for wanted in row["include"]:
        objects = certain(found, wanted["class"], counting, rules)[: wanted["count"]]
        right = len(objects) == wanted["count"]
        if right and "color" in wanted:
            right = colours_of(objects, wanted["class"]) == [wanted["color"]] * len(objects)
        if right and "position" in wanted:
            relation, target = wanted["position"]
            right = all(relation in relations(one.box, other.box, rules.position_threshold) for one in objects for other in taken[target])
        if not right:
            return False
        taken.append(objects)
    return all(len(certain(found, other["class"], counting, rules)) < other["count"] for other in row.get("exclude", []))


def certain(found: list[Detection], name: str, counting: bool, rules: Rules) -> list[Detection]:
    """The objects of a class that count, the most certain first."""
    least = rules.counting_threshold if counting else rules.threshold
    names = (name, *ALIASES.get(name, ()))
    objects = sorted((one for one in found if one.name in names and one.score > least), key=lambda one: -one.score)[: rules.max_objects]
    kept: list[Detection] = []
    for one in objects:
        if rules.max_overlap == 1 or all(overlap(one.box, other.box) < rules.max_overlap for other in kept):
            kept.append(one)
    return kept


def overlap(box: tuple, other: tuple) -> float:
    """Intersection over union of two boxes, whose last pixels are inside them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    both = area(*(max(pair) for pair in zip(box[:2], other[:2])), *(min(pair) for pair in zip(box[2:], other[2:])))
    union = area(*box) + area(*other) - both
    return both / union if union else 0.0


def relations(box: tuple, other: tuple, threshold: float) -> set[str]:
    """Where `box` is, seen from `other`: none of RELATIONS, one, or, on a diagonal, two.

    In x and y the offset of the centres counts as far as it is larger than `threshold` times the sum of the widths or heights. What is left
    must be more than half of the distance of the centres.
    """
    one, two = np.reshape(box, (2, 2)), np.reshape(other, (2, 2))  # left, top; right, bottom
    offset = one.mean(0) - two.mean(0)
    sizes = abs(one[1] - one[0]) + abs(two[1] - two[0])
    clear = np.sign(offset) * np.maximum(abs(offset) - threshold * sizes, 0)
    if (abs(clear) < 1e-3).all():
        return set()
    dx, dy = clear / np.linalg.norm(offset)
    return {name for name, value in zip(RELATIONS, (-dx, dx, -dy, dy)) if value > 0.5}


def _colours(objects: list[Detection], name: str, picture: Image.Image, name_colours: ColourNames | None) -> list[str]:
    """Of each object: what the detector says, or else CLIP."""
    if all(one.colour is not None for one in objects):
        return [one.colour for one in objects]
    if name_colours is None:
        raise UserError("geneval needs clip=FOLDER for the colours, which this detector does not judge")
    return name_colours(objects, name, picture)


def check(rows: Sequence[dict], detect: Detector, clip: bool) -> None:
    """Raise UserError, with the first, if there are rows that GenEval can't judge by this detector, with or without CLIP."""
    classes, colours = getattr(detect, "classes", None), getattr(detect, "colours", None)
    faults = [(row["prompt"], fault) for row in rows if (fault := _fault(row, classes, colours or COLOURS, clip or colours is not None))]
    if faults:
        raise UserError(
            f'geneval needs "tag" and "include" as in evaluation_metadata.jsonl, but can\'t judge {len(faults)} of {len(rows)} prompts, '
            f"the first of them {faults[0][0]!r}: {faults[0][1]}"
        )


def _fault(row: dict, classes: set[str] | None, colours: Sequence[str], sees_colours: bool) -> str:
    if not isinstance(row.get("tag"), str) or not isinstance(row.get("include"), list) or not row["include"]:
        return 'it has no string as "tag", or no list as "include"'
    if not isinstance(row.get("exclude", []), list):
        return 'its "exclude" is no list'
    for place, wanted in enumerate([*row["include"], *row.get("exclude", [])]):
        named = isinstance(wanted, dict) and isinstance(wanted.get("class"), str)
        if not named or type(wanted.get("count")) is not int or wanted["count"] < 1:
            return f'{wanted!r} has no string as "class", or no whole number above 0 as "count"'
        if classes is not None and not classes & {wanted["class"], *ALIASES.get(wanted["class"], ())}:
            return f"the detector does not know the class {wanted['class']!r}"
        if "color" in wanted and wanted["color"] not in colours:
            return f"the colour {wanted['color']!r} is none of {', '.join(colours)}"
        if "color" in wanted and not sees_colours:
            return "its colour needs clip=FOLDER, since the detector does not judge colours"
        if "position" in wanted:
            position = wanted["position"]
            pair = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS and type(position[1]) is int
            if not pair or not 0 <= position[1] < min(place, len(row["include"])):
                return f"the position {position!r} is not one of {', '.join(RELATIONS)} and the number of an earlier entry"
    return ""
