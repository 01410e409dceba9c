"""Pictures and clips as a page holds them: inside itself."""

import base64
import io
from html import escape
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from fastvideo.errors import UserError
from fastvideo.report.read import RunFiles, lines_of

LARGEST = 2**20  # bytes of a PNG that is embedded as it is; a larger one becomes a JPEG of at most these sides
SIDES = 1600, 8000


def samples(run: RunFiles, clips: int) -> str:
    """First and last grid of a run, and its first `clips` clips at both times; empty if there are none."""
    shown = run.samples()
    grids = [_grid(path, f"iteration {iteration}") for iteration, path in shown]
    pairs = [[_clip(path.with_name(f"{path.stem}_{i}.mp4"), f"iteration {at}") for at, path in shown] for i in range(clips)]
    captions = lines_of(shown[0][1].with_suffix(".txt")) if shown else []
    return _shown(grids, list(zip_longest(pairs, captions[:clips], fillvalue="")))


def evaluation(run: RunFiles, clips: int) -> str:
    """The grids of RUN/evaluation, and the first `clips` clips of each model."""
    _, paths, found = run.evaluation()
    pairs = [[_clip(path, _label(path)) for paths in found.values() for path in paths[i : i + 1]] for i in range(clips)]
    return _shown([_grid(path, path.stem) for path in paths], [(pair, "") for pair in pairs])


def _label(clip: Path) -> str:
    """What stands below the frames of a clip that is called `MODEL_NUMBER.mp4`: the model, its scores, the prompt."""
    model, _, number = clip.stem.rpartition("_")
    lines = [line for line in lines_of(clip.parent.with_suffix(".txt")) if line.startswith(f"{model} ")]
    return lines[int(number)] if int(number) < len(lines) else model


def _shown(grids: list[str], clips: list[tuple[list[str], str]]) -> str:
    rows = [
        f'<figure class="pair"><div>{"".join(pair)}</div><figcaption>{escape(caption)}</figcaption></figure>'
        for pair, caption in clips
        if any(pair)
    ]
    grid = f'<div class="grids">{"".join(grids)}</div>' if grids else ""
    if not rows:
        return grid
    return f'<div class="clips">{"".join(rows)}</div><details><summary>Their frames</summary>{grid}</details>'


def _grid(path: Path, caption: str) -> str:
    labels = " / ".join(filter(None, lines_of(path.with_suffix(".txt"))))
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            if len(data) > LARGEST:
                small = image.convert("RGB")
                small.thumbnail(SIDES)
                jpeg = io.BytesIO()
                small.save(jpeg, "JPEG", quality=88)
                data, kind, image = jpeg.getvalue(), "jpeg", small
            width, height = image.size
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} cannot be read: {error}") from error
    least = min(width, 560 if width < 1000 else 1000)  # narrower it is scrolled, so that its labels stay readable
    return (
        f'<figure class="grid"><figcaption>{escape(caption)}</figcaption><div class="scroll"><img width="{width}" height="{height}" '
        f'style="min-width:{least}px" alt="{escape(labels)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
        f"</div></figure>"
    )


def _clip(path: Path, caption: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><video muted loop playsinline preload="auto" src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
