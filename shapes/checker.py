"""Reads pictures of the shapes world back: which objects are there, and does the caption hold? No learned part: it works on pixels.

`check` answers GenEval's questions. `aesthetic` is a taste that knows nothing of captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastvideo.errors import UserError
from shapes.world import COLOURS, PIXEL_X, PIXEL_Y, SHAPES, SIZE, Spec, holds, signed_distance

PALETTE = np.array(list(COLOURS.values()), np.float32)  # (6, 3)
FOREGROUND_DISTANCE = 0.33  # RGB distance from the background at which a pixel belongs to an object
COLOUR_DISTANCE = 0.3  # RGB distance up to which a pixel has a palette colour
COLOUR_SHARE = 0.5  # an object has a colour if this share of its pixels has it
MIN_AREA = 10  # pixels; smaller specks are no objects
MIN_OVERLAP = 0.72  # intersection over union with the ideal shape of the same area and centroid
PARTS = ("count", "colour", "shape", "binding", "relation")


@dataclass(frozen=True)
class Detection:
    """An object found in a picture: its colour and shape (None where unrecognisable), its centroid and area in pixels.

    overlap: intersection over union with the ideal shape that fits best, recognised or not.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    area: int
    overlap: float


def check_shape(shape: Sequence[int]) -> None:
    if tuple(shape[1:]) != (3, SIZE, SIZE):
        raise UserError(f"the shapes checker reads pictures of 3 x {SIZE} x {SIZE}, not {' x '.join(map(str, shape[1:]))}")


def background_of(images: np.ndarray) -> np.ndarray:
    """Median colour of the outermost pixels: (N, 3, SIZE, SIZE) -> (N, 3, 1, 1)."""
    check_shape(images.shape)
    border = np.concatenate([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], axis=2)
    return np.median(border, axis=2)[:, :, None, None]


def components(mask: np.ndarray) -> np.ndarray:
    """Label connected pixels (edge to edge): (N, SIZE, SIZE) bool -> (N, SIZE, SIZE) int, 0 where the mask is False.

    Every pixel starts with its own number and takes the largest of its neighbours' until nothing changes.
    """
    labels = np.where(mask, np.arange(1, SIZE * SIZE + 1, dtype=np.int32).reshape(SIZE, SIZE), 0)
    while True:
        grown = labels.copy()
        np.maximum(grown[:, 1:], labels[:, :-1], out=grown[:, 1:])
        np.maximum(grown[:, :-1], labels[:, 1:], out=grown[:, :-1])
        np.maximum(grown[:, :, 1:], labels[:, :, :-1], out=grown[:, :, 1:])
        np.maximum(grown[:, :, :-1], labels[:, :, 1:], out=grown[:, :, :-1])
        grown *= mask
        if np.array_equal(grown, labels):
            return labels
        labels = grown


def detect(images: np.ndarray, chunk: int = 256) -> list[list[Detection]]:
    """The objects in each picture: (N, 3, SIZE, SIZE) in [0, 1] -> N lists. `chunk` pictures at a time, for memory's sake."""
    return [found for start in range(0, len(images), chunk) for found in _detect(images[start : start + chunk])]


def _detect(images: np.ndarray) -> list[list[Detection]]:
    labels = components(_length(images - background_of(images), axis=1) > FOREGROUND_DISTANCE)
    picture, masks = [], []  # of each object found
    for i, label in enumerate(labels):
        areas = np.bincount(label.ravel(), minlength=1)
        numbers = np.flatnonzero(areas[1:] >= MIN_AREA) + 1
        picture += [i] * len(numbers)
        masks += [label == number for number in numbers]
    found = [[] for _ in images]
    if not masks:
        return found
    masks = np.stack(masks)
    area = masks.sum((1, 2))
    x, y = (masks * PIXEL_X).sum((1, 2)) / area, (masks * PIXEL_Y).sum((1, 2)) / area
    colours, (shapes, overlaps) = _colours(images, picture, masks, area), _shapes(masks, area, x, y)
    for i, *fields in zip(picture, colours, shapes, x.tolist(), y.tolist(), area.tolist(), overlaps):
        found[i].append(Detection(*fields))
    return found


def _length(vectors: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((vectors * vectors).sum(axis))


def _colours(images: np.ndarray, picture: list[int], masks: np.ndarray, area: np.ndarray) -> list[str | None]:
    """The colour most pixels under each mask are close to. picture: whose mask each is, (n,); masks (n, SIZE, SIZE); area (n,)."""
    distance = np.stack([_length(images - colour[:, None, None], axis=1) for colour in PALETTE], axis=1)  # (N, 6, SIZE, SIZE)
    nearest = np.where(distance.min(1) < COLOUR_DISTANCE, distance.argmin(1), len(PALETTE))[picture]  # (n, SIZE, SIZE)
    votes = np.stack([np.bincount(numbers[mask], minlength=len(PALETTE) + 1)[:-1] for numbers, mask in zip(nearest, masks)])
    return [list(COLOURS)[vote.argmax()] if vote.max() > COLOUR_SHARE * total else None for vote, total in zip(votes, area)]


def _shapes(masks: np.ndarray, area: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[list[str | None], list[float]]:
    """The shape each mask overlaps best with, drawn with the mask's own area and centroid, and the intersections over unions with it."""
    radius = np.sqrt(area / np.pi)
    ideal = np.stack([signed_distance(shape, x, y, radius) < 0 for shape in SHAPES], axis=1)  # (n, 3, SIZE, SIZE)
    overlap = (ideal & masks[:, None]).sum((2, 3)) / (ideal | masks[:, None]).sum((2, 3))
    return [SHAPES[row.argmax()] if row.max() > MIN_OVERLAP else None for row in overlap], overlap.max(1).tolist()


def _matches(wanted: list, found: list) -> int:
    """How many of `wanted` are in `found`, each used once."""
    left = list(found)
    for item in wanted:
        if item in left:
            left.remove(item)
    return len(found) - len(left)


def check_one(found: list[Detection], spec: Spec) -> dict[str, float]:
    """Scores of one picture's detections; see `check`."""
    most = max(len(found), len(spec.objects))
    named = [(d.colour, d.shape) for d in found]
    parts = {
        "count": max(0.0, 1 - abs(len(found) - len(spec.objects)) / len(spec.objects)),
        "colour": _matches([colour for colour, _ in spec.objects], [d.colour for d in found]) / most,
        "shape": _matches([shape for _, shape in spec.objects], [d.shape for d in found]) / most,
        "binding": _matches(list(spec.objects), named) / most,
    }
    if spec.relation is not None:
        first, second = ([(d.x, d.y) for d, name in zip(found, named) if name == thing] for thing in spec.objects)
        parts["relation"] = float(any(holds(spec.relation, p, q) for p in first for q in second))
    well_formed = len(found) == len(spec.objects) and all(d.colour and d.shape for d in found)
    summary = {"strict": float(min(parts.values()) == 1), "soft": float(np.mean(list(parts.values()))), "well_formed": float(well_formed)}
    return summary | {"relation": 1.0} | parts


def check(images: np.ndarray, specs: list[Spec]) -> dict[str, np.ndarray]:
    """Judge pictures (N, 3, SIZE, SIZE) in [0, 1] by their specs; name -> (N,) float32 in [0, 1].

    count: 1 for the right number of objects, less by the relative error.
    colour, shape, binding: share of the objects with a right colour, shape, or both at once; missing and surplus objects count against it.
    relation: 1 if it holds, or if none was asked for.
    soft: mean of these parts (relation only where asked for). strict: 1 if all are 1, else 0.
    well_formed: the right number of recognisable objects, whatever they are; not part of the scores.
    """
    scores = [check_one(found, spec) for found, spec in zip(detect(images), specs, strict=True)]
    return {name: np.array([score[name] for score in scores], np.float32) for name in ("strict", "soft", "well_formed", *PARTS)}


def aesthetic(images: np.ndarray) -> np.ndarray:
    """`taste` of NumPy's arrays."""
    return taste(torch.from_numpy(images)).numpy()


def taste(images: torch.Tensor) -> torch.Tensor:
    """A taste, blind to captions: (N, 3, SIZE, SIZE) in [0, 1] -> (N,) in [0, 1], continuous in the pixels, with gradients.

    What it likes: objects that cover about 35 % of the picture (weight 0.3), a flat, clean background (0.25), vivid, saturated
    objects (0.25), and objects centred as a whole (0.2). It is no judgement of beauty: only something to train towards.
    """
    check_shape(images.shape)
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    background = border.sort(2).values[:, :, 2 * SIZE - 1 : 2 * SIZE + 1].mean(2)[:, :, None, None]  # as `background_of`
    distance = torch.linalg.vector_norm(images - background, dim=1)  # whose gradient at 0 is 0
    objectness = ((distance - 0.2) / 0.2).clamp(0, 1)  # (N, SIZE, SIZE), 1 on objects, 0 on background
    total = objectness.sum((1, 2)) + 1e-6
    some = (total / MIN_AREA).clamp(0, 1)  # no object: nothing vivid or centred
    size = (-(((objectness.mean((1, 2)) - 0.35) / 0.15) ** 2)).exp()
    deviation = (images - background).abs().mean(1) * (1 - objectness)
    clean = (-20 * deviation.sum((1, 2)) / ((1 - objectness).sum((1, 2)) + MIN_AREA)).exp()
    saturation = (images.amax(1) - images.amin(1)) / (images.amax(1) + 1e-3)
    vivid = some * (saturation * objectness).sum((1, 2)) / total
    x, y = ((objectness * torch.from_numpy(pixel).to(images)).sum((1, 2)) / total - SIZE / 2 for pixel in (PIXEL_X, PIXEL_Y))
    centred = some * (-(x**2 + y**2) / 6**2).exp()
    return 0.3 * size + 0.25 * clean + 0.25 * vivid + 0.2 * centred
