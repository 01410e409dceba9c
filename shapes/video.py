"""The shapes world in motion: short clips of one coloured shape that moves, bounces or grows, and the captions that say so."""

import re
from dataclasses import dataclass
from itertools import product

import numpy as np

from fastvideo.errors import UserError
from shapes.world import COLOURS, RL_COLOURS, SHAPES, SIZE, extent, signed_distance

FRAMES = 9  # of a clip, unless something else is asked for
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "bouncing", "growing")
# What is asked of every clip, over its whole length and whatever the number of its frames.
TRAVEL = 13.0  # pixels that a moving object goes, and a bouncing one falls and rises again
GROWTH = 1.7  # a growing object's last radius, as a multiple of its first
RADII = (4.4, 6.2)  # pixels, of a circle of the object's area
GROWING_RADII = (3.8, 4.8)  # the same, of a growing object in the first frame
MARGIN = 1.0  # pixels between an object and the edge of the picture


@dataclass(frozen=True)
class VideoSpec:
    """What a caption asks for: an object of `colour` and `shape`, and one of `MOTIONS`."""

    colour: str
    shape: str
    motion: str


VIDEO_SPECS = tuple(VideoSpec(*words) for words in product(RL_COLOURS, SHAPES, MOTIONS))  # 72


def caption(spec: VideoSpec) -> str:
    """Such as "a red circle moving right"; `parse_video` is its inverse."""
    return f"a {spec.colour} {spec.shape} {spec.motion}"


_CAPTION = re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})")


def parse_video(text: str) -> VideoSpec:
    """The spec of a caption, in any colour of the world. Raises UserError for text outside the grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise UserError(
            f"the caption {text!r} is not in the grammar of shapes in motion, 'a COLOUR SHAPE MOTION'; colours: {', '.join(COLOURS)}; "
            f"shapes: {', '.join(SHAPES)}; motions: {', '.join(MOTIONS)}"
        )
    return VideoSpec(*match.groups())


def paths(frames: int) -> np.ndarray:
    """The path that each of `MOTIONS` asks for: (6, frames, 3) of dx and dy in pixels and the share that the radius gains.

    All are 0 in the first frame. A bouncing object falls to the floor in the middle of the clip, ever faster, and comes back up.
    """
    time = np.linspace(0, 1, frames)
    still, far, gain = 0 * time, TRAVEL * time, (GROWTH - 1) * time
    bounce = TRAVEL * (1 - np.abs(np.cos(np.pi * time)))
    moves = [
        (-far, still, still),
        (far, still, still),
        (still, -far, still),
        (still, far, still),
        (still, bounce, still),
        (still, still, gain),
    ]
    return np.array(moves).transpose(0, 2, 1)


def tracks(specs: list[VideoSpec], frames: int, rng: np.random.Generator, jitter: float | np.ndarray = 0.0) -> np.ndarray:
    """Where the object is: (N, frames, 3) float32 of its centroid's x, y and its radius, in pixels. It starts where it has room to move.

    jitter: standard deviation in pixels, one for all or (N,), of displacements drawn for each frame; they don't leave the picture.
    """
    path = paths(frames)[[MOTIONS.index(spec.motion) for spec in specs]]
    growing = np.array([spec.motion == "growing" for spec in specs])
    first = np.where(growing, rng.uniform(*GROWING_RADII, len(specs)), rng.uniform(*RADII, len(specs)))
    radius = first[:, None] * (1 + path[:, :, 2])  # (N, frames)
    reach = np.array([extent(spec.shape, 1.0) for spec in specs])  # of a radius of 1 to either side, up, down
    largest = radius.max(1)[:, None]
    low = MARGIN + largest * reach[:, :2]  # (N, 2), the first x and y that are inside
    high = SIZE - MARGIN - largest * reach[:, [0, 2]]
    moves = path[:, :, :2]
    start = rng.uniform(low - moves.min(1), high - moves.max(1))
    centre = start[:, None] + moves + rng.normal(size=moves.shape) * np.reshape(jitter, (-1, 1, 1))
    centre = np.clip(centre, low[:, None], high[:, None])
    return np.concatenate([centre, radius[:, :, None]], axis=2).astype(np.float32)


def render_clips(specs: list[VideoSpec], tracks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Anti-aliased clips of objects on their `tracks`: (N, 3, frames, SIZE, SIZE) float32 in [0, 1].

    The grey of the background and the exact tint of the object are drawn from `rng`, one of each for a clip.
    """
    count, frames = tracks.shape[:2]
    grey = rng.uniform(0.8, 0.96, (count, 1)).astype(np.float32)
    tint = np.array([COLOURS[spec.colour] for spec in specs]) + rng.normal(0, 0.02, (count, 3))
    tint = np.clip(tint, 0, 1).astype(np.float32)
    clips = np.empty((count, 3, frames, SIZE, SIZE), np.float32)
    for i, spec in enumerate(specs):
        coverage = np.clip(0.5 - signed_distance(spec.shape, *tracks[i].T), 0, 1)
        clips[i] = grey[i] + coverage * (tint[i] - grey[i])[:, None, None, None]
    return clips
