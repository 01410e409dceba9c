"""Judges clips of the shapes world by their pixels, frame by frame and along the object's track. No learned part.

Where a frame shows several objects, its largest is the one whose track, form and colour count.
"""

import numpy as np

from fastvideo.errors import UserError
from shapes.checker import Detection, background_of, check_one, detect
from shapes.video import GROWTH, MOTIONS, VideoSpec, paths
from shapes.world import SHAPES, SIZE, Spec, signed_distance

CLEAR = 0.5  # of the asked motion: strict alignment asks for as much of it, and for less than half of that of any other
TOLERANCE = 1.4  # pixels that a track may stray (root mean square) before its smoothness is down to a half
LIKENESS = 0.15  # RGB distance over which a likeness of colours falls by a factor of e


def frames_of(clips: np.ndarray) -> np.ndarray:
    """The pictures of clips (N, 3, F, SIZE, SIZE), one clip's after another's: (N F, 3, SIZE, SIZE)."""
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 2 or clips.shape[3:] != (SIZE, SIZE):
        wanted = f"N x 3 x frames x {SIZE} x {SIZE} with at least 2 frames"
        raise UserError(f"the shapes checker reads clips of {wanted}, not {' x '.join(map(str, clips.shape))}")
    return clips.transpose(0, 2, 1, 3, 4).reshape(-1, 3, SIZE, SIZE)


def _largest(found: list[list[Detection]]) -> list[Detection | None]:
    return [max(detections, key=lambda detection: detection.area, default=None) for detections in found]


def _tracks(found: list[list[Detection]], frames: int) -> tuple[np.ndarray, np.ndarray]:
    """From the detections in every frame: tracks (N, F, 3) of x, y, radius in pixels, and (N, F) bool, where an object was seen.

    Frames without an object take what lies between their neighbours; all are 0 in a clip without any.
    """
    places = [(d.x, d.y, np.sqrt(d.area / np.pi)) if d else (0, 0, 0) for d in _largest(found)]
    tracks = np.array(places, np.float64).reshape(-1, frames, 3)
    seen = tracks[:, :, 2] > 0
    times = np.arange(frames)
    for i in np.flatnonzero(seen.any(1) & ~seen.all(1)):
        tracks[i] = np.stack([np.interp(times, times[seen[i]], values) for values in tracks[i, seen[i]].T], axis=1)
    return tracks, seen


def _centred(tracks: np.ndarray) -> np.ndarray:
    return tracks - tracks.mean(-2, keepdims=True)


def _amounts(tracks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each of `MOTIONS` is in tracks (N, F, 3): the amounts (N, 6), 1 for what is asked, and the asked paths (N, 6, F, 3).

    An amount is the regression of the track on the path. The paths are orthogonal, but for opposite directions.
    """
    asked = np.repeat(paths(tracks.shape[1])[None], len(tracks), axis=0)
    asked[..., 2] *= tracks[:, None, :, 2].mean(2, keepdims=True) * 2 / (1 + GROWTH)  # a share of the first radius, in pixels
    asked = _centred(asked)
    along = (asked * _centred(tracks)[:, None]).sum((2, 3))
    return along / np.maximum((asked**2).sum((2, 3)), 1e-6), asked


def check_clips(clips: np.ndarray, specs: list[VideoSpec]) -> dict[str, np.ndarray]:
    """Alignment of clips (N, 3, F, SIZE, SIZE) in [0, 1] with their specs; "soft" and "strict" -> (N,) float32 in [0, 1].

    soft: two thirds for the pictures, `shapes.checker.check`'s soft score averaged over the frames, and a third for the motion, which
    is the amount of the asked one less that of the strongest other.
    strict: 1 if every frame shows one object, the right one (it may go unrecognised in one frame of 8), and the motion is clearly the
    asked one, else 0.
    """
    found = detect(frames_of(clips))
    frames = clips.shape[2]
    amounts, _ = _amounts(_tracks(found, frames)[0])
    soft, strict = [], []
    for i, spec in enumerate(specs):
        motion = MOTIONS.index(spec.motion)
        amount, other = amounts[i, motion], np.delete(amounts[i], motion).max()
        pictures = found[i * frames : (i + 1) * frames]
        scores = [check_one(detections, Spec(((spec.colour, spec.shape),))) for detections in pictures]
        soft.append(2 / 3 * np.mean([score["soft"] for score in scores]) + 1 / 3 * np.clip(min(amount, 1) - max(other, 0), 0, 1))
        right = sum(score["strict"] for score in scores) >= frames - frames // 8 and all(score["count"] == 1 for score in scores)
        strict.append(right and amount >= CLEAR and other < CLEAR * amount)
    return {"soft": np.array(soft, np.float32), "strict": np.array(strict, np.float32)}


def motion_quality(clips: np.ndarray, specs: list[VideoSpec]) -> np.ndarray:
    """Is the motion the asked one, at the asked speed, straight and smooth: (N, 3, F, SIZE, SIZE) in [0, 1] -> (N,) float32 in [0, 1].

    A product of three: the amount of the asked motion (1 at the asked speed, less for slower and faster, 0 for none), how closely
    the track keeps to that path, from 1 down to a half at `TOLERANCE` pixels, and the squared share of frames that show an object.
    Colour and shape don't count.
    """
    tracks, seen = _tracks(detect(frames_of(clips)), clips.shape[2])
    amounts, asked = _amounts(tracks)
    which = np.arange(len(clips)), [MOTIONS.index(spec.motion) for spec in specs]
    amount = np.clip(amounts[which], 0, None)
    astray = _centred(tracks) - amount[:, None, None] * asked[which]
    speed = np.minimum(amount, 1 / np.maximum(amount, 1))
    smoothness = 1 / (1 + (astray**2).sum(2).mean(1) / TOLERANCE**2)
    return (speed * smoothness * seen.mean(1) ** 2).astype(np.float32)


def _outlines(found: list[list[Detection]]) -> np.ndarray:
    """Distance of every pixel to the outline of the ideal shape in place of each picture's object: (M, SIZE, SIZE) in pixels.

    Negative inside; SIZE everywhere if there is no object.
    """
    distance = np.full((len(found), SIZE, SIZE), float(SIZE), np.float32)
    largest = _largest(found)
    for shape in SHAPES:
        which = [i for i, d in enumerate(largest) if d and (d.shape or "circle") == shape]
        x, y, area = np.array([(largest[i].x, largest[i].y, largest[i].area) for i in which]).reshape(-1, 3).T
        distance[which] = signed_distance(shape, x, y, np.sqrt(area / np.pi))
    return distance


def _mean_colour(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(M, 3, SIZE, SIZE), (M, SIZE, SIZE) bool -> (M, 3), 0 where the mask is empty."""
    return (images * mask[:, None]).sum((2, 3)) / np.maximum(mask.sum((1, 2)), 1)[:, None]


def visual_quality(clips: np.ndarray) -> np.ndarray:
    """Is it a well-drawn clip, whatever it shows: (N, 3, F, SIZE, SIZE) in [0, 1] -> (N,) float32 in [0, 1].

    The form, times the geometric mean of the three others, each in [0, 1]:
    form: overlap of the object with the ideal shape that fits best, 0 from 0.5 down and 1 from 0.9 up, averaged over the frames.
    vivid: one saturated colour all over the object, averaged over the frames.
    clean: outside the object nothing but the clip's background grey.
    steady: colour and shape don't change from one frame to the next.
    """
    images, frames = frames_of(clips), clips.shape[2]
    found = detect(images)
    distance, largest = _outlines(found), _largest(found)
    form = np.array([np.clip((d.overlap - 0.5) / 0.4, 0, 1) if d else 0 for d in largest]).reshape(-1, frames).mean(1)

    inside = distance < -1
    colour = _mean_colour(images, inside)
    saturation = (colour.max(1) - colour.min(1)) / np.maximum(colour.max(1), 1e-3)
    variance = _mean_colour((images - colour[:, :, None, None]) ** 2, inside).sum(1)
    vivid = (np.minimum(saturation / 0.7, 1) * np.exp(-np.sqrt(variance) / LIKENESS)).reshape(-1, frames).mean(1)

    background = np.median(background_of(images).reshape(-1, frames, 3), axis=1)
    outside = distance > 1.5
    dirt = np.abs(images - np.repeat(background, frames, axis=0)[:, :, None, None]).mean(1) * outside
    clean = np.exp(-20 * dirt.reshape(len(clips), -1).sum(1) / np.maximum(outside.reshape(len(clips), -1).sum(1), 1))

    step = np.linalg.norm(np.diff(colour.reshape(-1, frames, 3), axis=1), axis=2)
    shapes = np.array([d.shape if d and d.shape else "" for d in largest]).reshape(-1, frames)
    same = (shapes[:, 1:] == shapes[:, :-1]) & (shapes[:, 1:] != "")
    steady = (same * np.exp(-step / LIKENESS)).mean(1)
    return (form * np.cbrt(vivid * clean * steady)).astype(np.float32)


def fidelity(clips: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Does a clip begin with its reference and keep to it: clips (N, 3, F, SIZE, SIZE), references (N, 3, SIZE, SIZE) -> (N,) float32.

    All in [0, 1]. A product: exp(-10 e) of the first frame's root mean square error e; and, averaged over the later frames, how like
    the reference's are the object's colour (0 if its shape is another) and the background's.
    """
    images, frames = frames_of(clips), clips.shape[2]
    error = np.sqrt(((clips[:, :, 0] - references) ** 2).mean((1, 2, 3)))
    colours, backgrounds, shapes = [], [], []
    for pictures in (references, images):
        found = detect(pictures)
        colours.append(_mean_colour(pictures, _outlines(found) < -1))
        backgrounds.append(background_of(pictures)[:, :, 0, 0])
        shapes.append(np.array([d.shape if d and d.shape else "" for d in _largest(found)]))
    colour, background = (np.linalg.norm(b.reshape(-1, frames, 3) - a[:, None], axis=2) for a, b in (colours, backgrounds))
    same = shapes[1].reshape(-1, frames) == shapes[0][:, None]
    kept = (same * np.exp(-(colour + background) / LIKENESS))[:, 1:].mean(1)
    return (np.exp(-10 * error) * kept).astype(np.float32)
