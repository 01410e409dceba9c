"""docs/files.md, row by row: each file is made and read by the reader that the scripts use."""

import gzip
import re
import struct
import subprocess
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from fastvideo.embeddings.encoders import read_image
from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.rewards.wire import unpack

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PIXELS = np.zeros((16, 24, 3), np.uint8)  # red, and blue in the right half
PIXELS[:, :12], PIXELS[:, 12:] = RED, BLUE
GREY = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
ON_WHITE = np.where(np.arange(24)[None, :, None] < 12, PIXELS, np.uint8(255))
FLOAT, WHOLE = ((GREY * 1.0).astype(dtype) for dtype in (np.float32, np.int32))


def rows(section: str) -> dict[str, tuple[str, str]]:
    """The first column of a section's table to the others: "read" or "refused", and how."""
    text = (REPOSITORY / "docs" / "files.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (.+) \| (read|refused) \| (.+) \|$", text, re.MULTILINE)
    return {name: (what, how) for name, what, how in found}


def refusal(how: str, path: Path | str) -> str:
    """A pattern of the sentence that the table quotes."""
    return re.escape(re.fullmatch("`(.*)`", how)[1].replace("FILE", str(path)))


def png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    """A PNG as PIL does not write it. data: of its lines, each after the number of its filter."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    sums = [(len(content), kind + content, zlib.crc32(kind + content)) for kind, content in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", size) + chunk + struct.pack(">I", crc) for size, chunk, crc in sums)


def saved(pixels: np.ndarray | Image.Image, name: str, **options):
    """A function that writes the picture as the file `name` of a folder."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)

    def make(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return make


def written(data: bytes, name: str):
    """A function that writes the bytes as the file `name` of a folder."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def cut(folder: Path) -> Path:
    path = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "x.png")(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def transparent(palette: bool) -> Image.Image:
    """The right half transparent, and blue under it."""
    if not palette:
        return Image.fromarray(np.dstack([PIXELS, np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(16, 0)]))
    image = Image.fromarray((PIXELS[..., 2] == 255).astype(np.uint8)).convert("P")
    image.putpalette([*RED, *BLUE])
    image.info["transparency"] = 1
    return image


TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees, clockwise
SIXTEEN = np.stack([PIXELS, np.full_like(PIXELS, 7)], -1).reshape(16, -1)  # upper and lower 8 bits
SIXTEEN = np.concatenate([np.zeros((16, 1), np.uint8), SIXTEEN], 1)  # each line after the number of its filter
FRAMES = [Image.fromarray(np.full((16, 24, 3), 9 * i, np.uint8)) for i in range(1, 3)]
LATER = {"save_all": True, "append_images": FRAMES}
LARGE = png(60_000, 60_000, 8, 2, bytes(1000))

# The row's name to a function that makes the file, what is read, and how far from it a value may be.
PICTURES = {
    "PNG": (saved(PIXELS, "x.png"), PIXELS, 0),
    "BMP": (saved(PIXELS, "x.bmp"), PIXELS, 0),
    "TIFF": (saved(PIXELS, "x.tiff", **LATER), PIXELS, 0),
    "lossless WebP": (saved(PIXELS, "x.webp", lossless=True), PIXELS, 0),
    "JPEG": (saved(PIXELS, "x.jpg", quality=95, subsampling=0), PIXELS, 8),
    "AVIF": (saved(PIXELS, "x.avif", quality=95, subsampling="4:4:4"), PIXELS, 16),
    "grey, 8 bits": (saved(GREY, "x.png"), GREY[..., None].repeat(3, 2), 0),
    "grey, 16 bits": (saved(GREY.astype(np.uint16) * 257, "x.png"), GREY[..., None].repeat(3, 2), 0),
    "grey with alpha": (saved(Image.new("LA", (24, 16), (0, 51)), "x.png"), np.full((16, 24, 3), 204), 0),
    "black and white, 1 bit": (saved(Image.fromarray(PIXELS[..., 0] > 0), "x.png"), PIXELS[..., :1].repeat(3, 2), 0),
    "colour, 16 bits a channel": (written(png(24, 16, 16, 2, SIXTEEN.tobytes()), "x.png"), PIXELS, 0),
    "transparent PNG": (saved(transparent(palette=False), "x.png"), ON_WHITE, 0),
    "palette with a transparent colour": (saved(transparent(palette=True), "x.png"), ON_WHITE, 0),
    "CMYK JPEG": (saved(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "x.jpg"), np.full((16, 24, 3), RED), 2),
    "turned by EXIF data": (saved(PIXELS, "x.png", exif=TURNED), np.rot90(PIXELS, -1), 0),
    "animated GIF": (saved(PIXELS, "x.gif", **LATER), PIXELS, 0),
    "animated PNG": (saved(PIXELS, "x.png", **LATER), PIXELS, 0),
    "animated WebP": (saved(PIXELS, "x.webp", lossless=True, **LATER), PIXELS, 0),
    "PNG named .jpg": (saved(PIXELS, "x.jpg", format="PNG"), PIXELS, 0),
    "floating-point TIFF": (saved(FLOAT, "x.tiff"), None, 0),
    "whole numbers of 32 bits, TIFF": (saved(WHOLE, "x.tiff"), None, 0),
    "cut off": (cut, None, 0),
    "empty": (written(b"", "x.png"), None, 0),
    "text named .png": (written(b"a red circle\n" * 9, "x.png"), None, 0),
    "SVG": (written(b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="16"></svg>', "x.svg"), None, 0),
    "PostScript": (saved(PIXELS, "x.eps"), None, 0),
    "more than 178,956,970 pixels": (written(LARGE, "x.png"), None, 0),
}

JSONL = b'{"prompt": "a cat", "n": 1}\n{"prompt": "a dog"}\n'
# The row's name to the file's name and bytes, and the prompts that are read.
PROMPTS = {
    "UTF-8 .txt": ("x.txt", "a cat \n  日本\n".encode(), ["a cat", "日本"]),
    "UTF-8 .jsonl": ("x.jsonl", JSONL, [{"prompt": "a cat", "n": 1}, "a dog"]),
    "with a byte order mark": ("x.txt", "\ufeffa cat\n\ufeffa dog\n".encode(), ["a cat", "a dog"]),
    "lines that end in CR LF": ("x.txt", b"a cat\r\n\r\na dog\r\n", ["a cat", "a dog"]),
    "without a last line break": ("x.txt", b"a cat\na dog", ["a cat", "a dog"]),
    "empty lines, and lines of spaces": ("x.txt", "\n \t\na cat\n\u3000\n".encode(), ["a cat"]),
    "lines of invisible characters only": ("x.txt", "\u200b\na cat\n\u200e \u200d\n".encode(), ["a cat"]),
    "the same prompt again": ("x.txt", b"a cat\na dog\na cat \n", ["a cat", "a dog"]),
    "tabs in .txt": ("x.txt", b"1\ta cat\n2\ta dog\n", ["1\ta cat", "2\ta dog"]),
    "commas and quotes in .txt": ("x.txt", b'n,prompt\n1,"a cat, a dog"\n', ["n,prompt", '1,"a cat, a dog"']),
    "U+2028 in .txt": ("x.txt", "a cat\u2028a dog\n".encode(), ["a cat\u2028a dog"]),
    "escaped line breaks in .jsonl": ("x.jsonl", b'{"prompt": "a cat\\r\\na dog"}\n', ["a cat\r\na dog"]),
    "UTF-16": ("x.txt", "a cat\na dog\n".encode("utf-16"), None),
    "UTF-16 without a byte order mark": ("x.txt", "a cat\na dog\n".encode("utf-16-le"), None),
    "UTF-32": ("x.txt", "a cat\na dog\n".encode("utf-32"), None),
    "Latin-1": ("x.txt", "a cat\na café\n".encode("latin-1"), None),
    "lines that end in CR": ("x.txt", b"a cat\ra dog\r", None),
    "a NUL byte": ("x.txt", b"a cat\na \x00 dog\n", None),
    "an escape sequence": ("x.txt", b"a cat\n\x1b[31ma dog\n", None),
    "an escaped NUL in .jsonl": ("x.jsonl", b'{"prompt": "a\\u0000cat"}\n', None),
    "NaN in .jsonl": ("x.jsonl", b'{"prompt": "a cat", "n": NaN}\n', None),
    "half a character in .jsonl": ("x.jsonl", b'{"prompt": "a \\ud83d"}\n', None),
    "a list in .jsonl": ("x.jsonl", b'["a cat", "a dog"]\n', None),
    "a list over several lines in .jsonl": ("x.jsonl", b'[\n  {"prompt": "a cat"},\n  {"prompt": "a dog"}\n]\n', None),
    "an object over several lines in .jsonl": ("x.jsonl", b'{\n  "prompt": "a cat"\n}\n', None),
    'no "prompt" in .jsonl': ("x.jsonl", b'{"text": "a cat"}\n', None),
    "gzip": ("x.jsonl.gz", gzip.compress(JSONL), None),
    "gzip named .jsonl": ("x.jsonl", gzip.compress(JSONL), None),
    ".csv": ("x.csv", b"prompt\na cat\n", None),
    "empty file": ("x.txt", b"", None),
    "a folder": ("x.txt", None, None),
}

# The row's name to the file's ending, ffmpeg's options, and the frames, height and width that are read. 32 x 24 pixels, 8 frames, red
# on the left and blue on the right.
HALVES = ("-f", "lavfi", "-i", "color=red:s=16x24:r=8:d=1[a];color=blue:s=16x24:r=8:d=1[b];[a][b]hstack")
SOUND = ("-f", "lavfi", "-i", "sine=d=1")
H264 = ("-c:v", "libx264", "-qp", "0")
CLIPS = {
    "H.264 mp4": ("mp4", (*HALVES, *H264), (8, 24, 32)),
    "odd sizes": ("mp4", (*HALVES, "-vf", "scale=33:25", "-pix_fmt", "yuv444p", *H264), (8, 25, 33)),
    "10 bits a channel": ("mp4", (*HALVES, "-pix_fmt", "yuv420p10le", *H264), (8, 24, 32)),
    "turned by its metadata": ("mp4", (*HALVES, *H264), (8, 32, 24)),
    "varying frame rate": ("mp4", (*HALVES, "-vf", r"setpts=if(lt(N\,4)\,N\,4+3*(N-4))/8/TB", "-fps_mode", "vfr", *H264), (14, 24, 32)),
    "with sound": ("mp4", (*HALVES, *SOUND, *H264), (8, 24, 32)),
    "QuickTime (.mov)": ("mov", (*HALVES, *H264), (8, 24, 32)),
    "only sound": ("mp4", SOUND, None),
    "no frames": ("mp4", (*HALVES, *H264, "-frames:v", "0"), None),
    "WebM": ("webm", HALVES, None),
    "GIF": ("gif", HALVES, None),
    "cut off in the middle": ("mp4", (*HALVES, *H264), None),
    "larger than the server's limit": ("mp4", (*HALVES, *H264), None),
}


@pytest.mark.parametrize(("section", "made"), [("Pictures", PICTURES), ("Prompt files", PROMPTS), ("Clips", CLIPS)])
def test_every_row_is_made_here(section, made):
    told = rows(section)
    assert list(told) == list(made)
    assert [what == "read" for what, _ in told.values()] == [
        entry[2 if section != "Pictures" else 1] is not None for entry in made.values()
    ]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    make, expected, most = PICTURES[name]
    path = make(tmp_path)
    if expected is None:
        with pytest.raises(UserError, match=rf"^image {path} cannot be read: .*{refusal(rows('Pictures')[name][1], path)}") as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
    else:
        image = read_image(path)
        assert image.mode == "RGB" and np.asarray(image).shape == expected.shape
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= most


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_files(tmp_path, name):
    file, data, expected = PROMPTS[name]
    path = tmp_path / file
    path.mkdir() if data is None else path.write_bytes(data)
    if expected is None:
        with pytest.raises(UserError, match=refusal(rows("Prompt files")[name][1], path)) as caught:
            read_prompts(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    else:
        read, report = read_prompts(path)
        assert read == [row if isinstance(row, dict) else {"prompt": row} for row in expected]
        assert sum(map(len, report.values())) == len(data.decode().removesuffix("\n").split("\n"))  # each line is told of


@pytest.mark.parametrize("name", CLIPS)
def test_clips(tmp_path, name):
    ending, options, expected = CLIPS[name]
    path = tmp_path / f"x.{ending}"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, *options, path], check=True)
    if name == "turned by its metadata":
        subprocess.run([*ffmpeg, "-display_rotation", "90", "-i", path, "-c", "copy", tmp_path / "turned.mp4"], check=True)
        path = tmp_path / "turned.mp4"
    body = path.read_bytes()
    if name == "cut off in the middle":
        body = body[: len(body) // 2]
    most_bytes = 8 * 24 * 32 * 3 - 1 if name.startswith("larger") else 1e6
    if expected is None:
        with pytest.raises(ValueError, match=refusal(rows("Clips")[name][1], path)):
            unpack(body, "video/mp4", "a cat", most_bytes)
        return
    media, _ = unpack(body, "video/mp4", "a cat", most_bytes)
    assert media.shape == (1, 3, *expected)
    first, last = (media[0, :, :, :, :8], media[0, :, :, :, -8:]) if "turned" not in name else (media[0, :, :, -8:], media[0, :, :, :8])
    for part, colour in ((first, RED), (last, BLUE)):
        assert np.abs(part.float().mean((1, 2, 3)).numpy() - colour).max() < 6
