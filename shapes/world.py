"""The shapes world: what captions can say, and pictures of it.

A picture is 32 x 32 px: one to three flat shapes on a light grey background. A caption says what is on it, in a grammar that asks
GenEval's questions: a single object ("a red circle"), counting ("three blue squares"), two objects and the attribution of
their colours ("a red circle and a blue square"), position ("a green triangle left of a yellow circle").
"""

import re
from dataclasses import dataclass
from itertools import product

import numpy as np

from fastvideo.errors import UserError

SIZE = 32  # height and width of a picture, in pixels
COLOURS = {  # name -> red, green, blue in [0, 1]
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.16, 0.28, 0.86),
    "yellow": (0.93, 0.79, 0.12),
    "purple": (0.59, 0.20, 0.70),
    "cyan": (0.10, 0.75, 0.80),
}
RL_COLOURS = ("red", "green", "blue", "yellow")  # of the captions that RL uses
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {"two": 2, "three": 3}
QUESTIONS = ("single", "counting", "pair", "attribution", "position")

THINGS = tuple(product(COLOURS, SHAPES))  # the 18 objects, as (colour, shape)
# Radii in pixels by number of objects, of a circle of the object's area. Fewer objects are drawn larger.
RADII = {1: (5.5, 8.5), 2: (4.6, 6.2), 3: (3.8, 4.8)}
PIXEL_Y, PIXEL_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # centres of the pixels


@dataclass(frozen=True)
class Spec:
    """What a caption asks for.

    objects: (colour, shape) of each object, in the caption's order; counting repeats one of them.
    relation: where the first of two objects is, seen from the second; None if the caption doesn't say.
    """

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def question(self) -> str:
        """Which of `QUESTIONS` this is; "attribution" is a pair of two colours, "pair" one of two shapes in one colour."""
        if len(self.objects) == 1:
            return "single"
        if self.relation is not None:
            return "position"
        if len(set(self.objects)) == 1:
            return "counting"
        return "attribution" if self.objects[0][0] != self.objects[1][0] else "pair"


def all_specs() -> list[Spec]:
    """Everything the grammar can say: 1,584 specs."""
    specs = [Spec((thing,) * number) for number in (1, *COUNTS.values()) for thing in THINGS]
    for pair in product(THINGS, THINGS):
        if pair[0] != pair[1]:
            specs += [Spec(pair, relation) for relation in (None, *RELATIONS)]
    return specs


def caption(spec: Spec) -> str:
    """The sentence for a spec; `parse` is its inverse."""
    names = [f"{colour} {shape}" for colour, shape in spec.objects]
    if spec.question == "single":
        return f"a {names[0]}"
    if spec.question == "counting":
        word = next(word for word, number in COUNTS.items() if number == len(names))
        return f"{word} {names[0]}s"
    return f"a {names[0]} {spec.relation or 'and'} a {names[1]}"


_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SINGLE = re.compile(rf"a {_THING}")
_COUNTING = re.compile(rf"({'|'.join(COUNTS)}) {_THING}s")
_TWO = re.compile(rf"a {_THING} (and|{'|'.join(RELATIONS)}) a {_THING}")


def parse(text: str) -> Spec:
    """The spec of a caption. Raises UserError for text outside the grammar."""
    if match := _SINGLE.fullmatch(text):
        return Spec((match.groups(),))
    if match := _COUNTING.fullmatch(text):
        number, colour, shape = match.groups()
        return Spec(((colour, shape),) * COUNTS[number])
    match = _TWO.fullmatch(text)
    if match is None:
        raise UserError(
            f"the caption {text!r} is not in the shapes grammar: 'a COLOUR SHAPE', 'two COLOUR SHAPEs', 'three COLOUR SHAPEs', or "
            "'a COLOUR SHAPE and a COLOUR SHAPE', where 'left of', 'right of', 'above' or 'below' may stand for 'and'; "
            f"colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}"
        )
    first, second, relation = match.groups()[:2], match.groups()[3:], match.group(3)
    if first == second:
        raise UserError(f"the caption {text!r} names one object twice; the shapes grammar says 'two {' '.join(first)}s'")
    return Spec((first, second), None if relation == "and" else relation)


def compatible(a: Spec, b: Spec) -> bool:
    """Whether one picture can satisfy both: "a X and a Y" with "a Y and a X" or "a X above a Y", but not with "a X and a Z"."""
    if sorted(a.objects) != sorted(b.objects):
        return False
    if a.relation is None or b.relation is None:
        return True
    return a.relation == (b.relation if a.objects == b.objects else OPPOSITE[b.relation])


def sample_spec(rng: np.random.Generator) -> Spec:
    """A random spec: 20 % single objects, 25 % counting, 25 % two objects, 30 % positions."""
    kind = rng.choice(4, p=[0.2, 0.25, 0.25, 0.3])
    first, second = (THINGS[i] for i in rng.choice(len(THINGS), 2, replace=False))
    if kind == 0:
        return Spec((first,))
    if kind == 1:
        return Spec((first,) * int(rng.integers(2, 4)))
    return Spec((first, second), None if kind == 2 else RELATIONS[rng.integers(4)])


def mutate(spec: Spec, rng: np.random.Generator) -> Spec:
    """A spec of the same question that differs in one respect and can't be true of the same picture: a hard negative.

    Another colour or shape of one object, another number, another relation, or the colours of the two objects swapped.
    """
    while True:
        mutant = _change_one_thing(spec, rng)
        repeated = spec.question != "counting" and len(set(mutant.objects)) < len(mutant.objects)
        if not repeated and not compatible(spec, mutant):
            return mutant


def _change_one_thing(spec: Spec, rng: np.random.Generator) -> Spec:
    change = rng.choice(["colour", "shape", "structure"])
    if change == "structure" and spec.question == "counting":
        return Spec(spec.objects[:1] * (5 - len(spec.objects)))
    if change == "structure" and spec.question == "position" and rng.random() < 0.5:
        return Spec(spec.objects, RELATIONS[rng.integers(4)])
    if change == "structure" and len(spec.objects) == 2:
        (colour_1, shape_1), (colour_2, shape_2) = spec.objects
        return Spec(((colour_2, shape_1), (colour_1, shape_2)), spec.relation)
    which = rng.integers(len(spec.objects))
    colour, shape = spec.objects[which]
    replacement = (str(rng.choice(list(COLOURS))), shape) if change == "colour" else (colour, str(rng.choice(SHAPES)))
    if spec.question == "counting":
        return Spec((replacement,) * len(spec.objects))
    return Spec(tuple(replacement if i == which else thing for i, thing in enumerate(spec.objects)), spec.relation)


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether the point `first` is e.g. "left of" `second`: (x, y) in pixels, y downwards; the larger of the two offsets decides."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (relation in ("left of", "above"))


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels of every pixel centre to the outline, negative inside: (n,) centres and radii -> (n, SIZE, SIZE).

    All shapes of one radius have the same area; (x, y) is the centroid. Outside a corner it is less than the Euclidean distance.
    """
    x, y, radius = (np.asarray(value, np.float32)[:, None, None] for value in (x, y, radius))
    dx, dy = PIXEL_X - x, PIXEL_Y - y
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.sqrt(np.pi) / 2 * radius
    half_base = np.sqrt(np.pi / 2) * radius  # upright, and as high as wide: area 2 half_base^2 = pi radius^2
    below_base = dy - 2 / 3 * half_base
    beyond_side = (2 * np.abs(dx) - dy - 4 / 3 * half_base) / np.sqrt(5)
    return np.maximum(below_base, beyond_side)


def extent(shape: str, radius: float) -> tuple[float, float, float]:
    """How far a shape reaches from its centroid in pixels: to either side, up, down."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        return (np.sqrt(np.pi) / 2 * radius,) * 3
    half_base = np.sqrt(np.pi / 2) * radius
    return half_base, 4 / 3 * half_base, 2 / 3 * half_base


def layout(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """Random places for a spec's objects, apart from each other and true to its relation: (objects, 3) of x, y, radius in pixels."""
    while True:
        places = []
        for _, shape in spec.objects:
            radius = rng.uniform(*RADII[len(spec.objects)])
            side, up, down = extent(shape, radius)
            places.append((rng.uniform(side + 1, SIZE - 1 - side), rng.uniform(up + 1, SIZE - 1 - down), radius))
        if spec.relation is not None:
            offsets = np.abs(np.subtract(places[0], places[1])[:2])
            clear = offsets.max() > 1.4 * offsets.min()  # nobody should have to measure which offset is larger
            if not clear or not holds(spec.relation, places[0][:2], places[1][:2]):
                continue
        if _apart(spec, places):
            return np.array(places, np.float32)


def _apart(spec: Spec, places: list[tuple[float, float, float]], gap: float = 2.0) -> bool:
    """Whether `gap` pixels lie between any two objects: at no point is the sum of the distances to both smaller."""
    for i, (x, y, radius) in enumerate(places):  # the cheap test first: circles of the objects' areas would touch
        if any(np.hypot(x - other_x, y - other_y) < radius + other_radius + gap for other_x, other_y, other_radius in places[:i]):
            return False
    distances = [signed_distance(shape, [x], [y], [radius])[0] for (_, shape), (x, y, radius) in zip(spec.objects, places)]
    return all((distances[i] + distances[j]).min() > gap for i in range(len(places)) for j in range(i))


def render(specs: list[Spec], rng: np.random.Generator, layouts: list[np.ndarray] | None = None) -> np.ndarray:
    """Anti-aliased pictures of `specs`: (N, 3, SIZE, SIZE) float32 in [0, 1].

    The grey of the background and the exact tint of every object are drawn from `rng`, and so are the places, unless `layouts` gives them.
    """
    layouts = [layout(spec, rng) for spec in specs] if layouts is None else layouts
    images = np.ones((len(specs), 3, SIZE, SIZE), np.float32) * rng.uniform(0.8, 0.96, (len(specs), 1, 1, 1)).astype(np.float32)
    for turn in range(max(len(spec.objects) for spec in specs)):  # the first object of every picture, then the second ...
        for shape in SHAPES:
            which = [i for i, spec in enumerate(specs) if len(spec.objects) > turn and spec.objects[turn][1] == shape]
            if not which:
                continue
            x, y, radius = np.array([layouts[i][turn] for i in which]).T
            coverage = np.clip(0.5 - signed_distance(shape, x, y, radius), 0, 1)[:, None]
            tint = np.array([COLOURS[specs[i].objects[turn][0]] for i in which]) + rng.normal(0, 0.02, (len(which), 3))
            images[which] += coverage * (np.clip(tint, 0, 1).astype(np.float32)[:, :, None, None] - images[which])
    return images
