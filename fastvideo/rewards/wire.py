"""A batch as the body of a request, both ways: `pack` for the `http` reward, `unpack` for the server.

A safetensors file: the tensor "media" and, in its metadata, the "rows" as JSON. The server takes single PNG and mp4 files too.
"""

import json
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from fastvideo.media import to_rgb

SAFETENSORS, PNG, MP4 = KINDS = ("application/x-safetensors", "image/png", "video/mp4")


def pack(media: torch.Tensor, rows: list[dict], send: str) -> bytes:
    """media (B, 3, ...) in [-1, 1] and B rows as bytes, sent as "float32" or "uint8". Equal batches are equal bytes."""
    media = media.detach().float().cpu()
    if send == "uint8":
        media = ((media.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return safetensors.torch.save({"media": media.contiguous()}, {"rows": json.dumps(rows)})


def unpack(body: bytes, kind: str, prompt: str | None, most_bytes: float) -> tuple[torch.Tensor, list[dict]]:
    """A request's batch, of a Content-Type of KINDS: media (B, 3, H, W) or (B, 3, F, H, W) as they were sent, and B rows.

    uint8 or floating point in [-1, 1]; `to_float` makes them what rewards take. Raises ValueError for whatever is wrong.
    """
    if kind in (PNG, MP4):
        if not prompt:
            raise ValueError(f"a body of type {kind} needs &prompt=TEXT in the address")
        media, rows = (_unpack_png if kind == PNG else _unpack_mp4)(body, most_bytes)[None], [{"prompt": prompt}]
    else:
        try:
            tensors = safetensors.torch.load(body)
            rows = json.loads(json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["rows"])
            json.dumps(rows, ensure_ascii=False).encode()  # fails on half a character
        except Exception as error:  # of all sorts: SafetensorError, KeyError, RecursionError, ...
            raise ValueError(f'the body is no safetensors file with "rows" in its metadata: {type(error).__name__}: {error}') from error
        if list(tensors) != ["media"]:
            raise ValueError(f'the body must have one tensor, "media", not {sorted(tensors)}')
        media = tensors["media"]
    if media.dtype not in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the media are {media.dtype}, but must be uint8 or floating point of at most 32 bits")
    if media.ndim not in (4, 5) or media.shape[1] != 3 or not media.numel():
        raise ValueError(f"the media must have shape (B, 3, H, W) or (B, 3, frames, H, W), not {tuple(media.shape)}")
    if media.is_floating_point():
        low, high = media.aminmax()
        if not (low >= -1 and high <= 1):
            raise ValueError("the media have values outside of [-1, 1]")
    if not isinstance(rows, list) or len(rows) != len(media):
        raise ValueError(f"the rows must be a list with one entry for each of {len(media)} samples")
    if not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
        raise ValueError('each row must be an object with a string as "prompt"')
    return media, rows


def to_float(media: torch.Tensor) -> torch.Tensor:
    """Media of `unpack` as float32 in [-1, 1]."""
    return media.float() / 127.5 - 1 if media.dtype == torch.uint8 else media.float()


def _unpack_png(body: bytes, most_bytes: float) -> torch.Tensor:
    """(3, H, W) uint8."""
    try:
        with Image.open(BytesIO(body), formats=["PNG"]) as image:
            size = image.size
            pixels = np.array(to_rgb(image)) if 3 * size[0] * size[1] <= most_bytes else None
    except Exception as error:  # of all sorts: OSError, SyntaxError, DecompressionBombError, ...
        raise ValueError(f"the body is no PNG file: {error}") from error
    if pixels is None:
        raise ValueError(f"the picture of {size[0]} x {size[1]} pixels is too large for --max_megabytes")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unpack_mp4(body: bytes, most_bytes: float) -> torch.Tensor:
    """(3, F, H, W) uint8. ffmpeg is a process of its own, which a broken file may crash, and reads nothing but this file, as mp4.

    What the file says of its size is believed before anything is decoded, and its frames are counted as they come, since it may lie.
    """
    import imageio_ffmpeg

    too_large = ValueError("the clip is too large for --max_megabytes")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(body)
        file.flush()
        frames, size = [], 0
        limits = ["-max_pixels", str(int(most_bytes // 3)), "-f", "mp4", "-protocol_whitelist", "file"]
        reader = imageio_ffmpeg.read_frames(file.name, input_params=limits)
        try:
            about = next(reader)
            width, height = about["size"]
            if width * height * 3 * (about["fps"] * about["duration"] - 1) > most_bytes:  # less one: durations are rounded
                raise too_large
            for frame in reader:
                size += len(frame)
                if size > most_bytes:
                    raise too_large
                frames.append(np.frombuffer(frame, np.uint8).reshape(height, width, 3))
        except Exception as error:  # OSError, StopIteration, ...
            if error is too_large or "max pixel count" in str(error):  # what ffmpeg says of -max_pixels
                raise too_large from None
            raise ValueError(f"the body is no mp4 file with frames that can be read: {type(error).__name__}") from error
        finally:
            reader.close()
    if not frames:
        raise ValueError("the clip has no frames")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


def confine_images(rows: list[dict], images: Path | None) -> None:
    """What rows may have opened: an "image" within the folder `images`, else none. Raises ValueError for one outside of it."""
    for row in rows:
        if images is None:
            row.pop("image", None)
        elif "image" in row:
            try:
                inside = Path(row["image"]).resolve().is_relative_to(images.resolve())
            except (TypeError, ValueError, OSError, RuntimeError):  # no string, a null byte, too long, a loop of links
                inside = False
            if not inside:
                raise ValueError(f"the image {row['image']!r} of a row is not in the folder --images {images}")
