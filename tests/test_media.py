"""Clips as mp4 files and as film strips."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from matplotlib import font_manager
from PIL import Image, ImageFont

from fastvideo import media
from fastvideo.errors import UserError
from fastvideo.media import film_strip, read_video, save_samples, save_video, to_pil
from shapes.video import VIDEO_SPECS, render_clips, tracks


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """(3, 9, 32, 32) in [-1, 1]."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(render_clips(VIDEO_SPECS[:1], tracks(VIDEO_SPECS[:1], 9, rng), rng))[0] * 2 - 1


def test_a_clip_comes_back_from_its_mp4(tmp_path, clip):
    path = tmp_path / "clips" / "one.mp4"
    save_video(path, clip, fps=8)
    read = read_video(path)
    assert read.shape == clip.shape and read.dtype == torch.float32 and read.min() >= -1 and read.max() <= 1
    assert (read - clip).abs().mean() < 0.03  # 0.017 on average: H.264 stores one colour for 2 x 2 pixels, which blurs the edges
    assert [entry.name for entry in path.parent.iterdir()] == ["one.mp4"]


def test_frames_keep_their_order_and_number(tmp_path):
    grey = torch.linspace(-1, 1, 13)
    save_video(tmp_path / "grey.mp4", grey[None, :, None, None].expand(3, 13, 24, 40), fps=16)
    read = read_video(tmp_path / "grey.mp4")
    assert read.shape == (3, 13, 24, 40)
    assert torch.allclose(read.mean((0, 2, 3)), grey, atol=0.02)


def test_odd_sizes_grow_by_a_copied_row_and_column(tmp_path, clip):
    save_video(tmp_path / "odd.mp4", clip[:, :, :31, :29], fps=8)
    read = read_video(tmp_path / "odd.mp4")
    assert read.shape == (3, 9, 32, 30)
    assert (read[:, :, :31, :29] - clip[:, :, :31, :29]).abs().mean() < 0.03


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no video" * 99, lambda data: data[: len(data) // 2]])
def test_a_broken_video_is_refused(tmp_path, clip, damage):
    path = tmp_path / "broken.mp4"
    save_video(path, clip, fps=8)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"the video .*broken\.mp4 cannot be read: ") as caught:
        read_video(path)
    assert "\n" not in str(caught.value)


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no video .*nowhere\.mp4"):
        read_video(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize(("frames", "shown"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (11, [0, 2, 4, 6, 8, 10])])
def test_film_strips_show_frames_side_by_side(frames, shown):
    grey = torch.linspace(-1, 0.9, frames)
    clips = grey[None, None, :, None, None].expand(2, 3, frames, 4, 6)
    strips = film_strip(clips)
    assert len(strips) == 2
    pixels = np.asarray(strips[0])
    assert pixels.shape == (4, 7 * len(shown), 3)
    for place, frame in enumerate(shown):
        assert (pixels[:, 7 * place : 7 * place + 6] == round((grey[frame].item() + 1) * 127.5)).all()
        assert (pixels[:, 7 * place + 6] == 255).all()


def test_labels_stand_whole_beside_the_grid(tmp_path):
    labels = ["一只红色的猫", "кот " * 60, "two\nlines"]
    save_samples(tmp_path / "grid.png", torch.zeros(3, 3, 8, 8), labels)
    assert (tmp_path / "grid.txt").read_text(encoding="utf-8").splitlines() == [labels[0], labels[1].strip(), "two lines"]


def drawn(folder, label: str) -> np.ndarray:
    """What stands below a picture."""
    save_samples(folder / "grid.png", torch.zeros(1, 3, 192, 192), [label])
    return np.asarray(Image.open(folder / "grid.png"))[192:]


CAPTION = "a photo of a small red circle to the left of one blue square"
SCORES = "trained 0.52 1.00 0.48 0.33"


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 512, 512), (3, 9, 32, 32), (3, 1, 32, 32)])
def test_a_caption_of_60_characters_is_drawn_to_its_last_word(tmp_path, shape):
    """As training and evaluation label them: another last word is another picture, and that word is where the text ends."""
    assert len(CAPTION) == 60
    pixels = {}
    for label in (CAPTION, f"{SCORES} {CAPTION}"):
        for last in ("square", "circle", ""):
            save_samples(tmp_path / "grid.png", torch.ones(1, *shape), [label.removesuffix("square") + last])
            pixels[last] = np.asarray(Image.open(tmp_path / "grid.png"))
        assert (pixels["square"] != pixels["circle"]).any()
        shorter = pixels[""]
        kept = pixels["square"][: len(shorter)]
        assert not ((shorter < 128) & (kept >= 128)).any(), "a word more takes none away, as an ellipsis would"


def test_letters_of_labels_are_large_enough_to_read(tmp_path):
    """A capital has 10 pixels where pictures are tiny, and is not lost below large ones; no picture is smoothed."""
    tiny, large = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 720, 720)
    tiny[0, :, 5, 7] = 1
    for media_shown, height, capital in ((tiny, 192, 10), (large, 720, 20)):
        save_samples(tmp_path / "grid.png", media_shown, ["H"])
        grid = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
        assert np.flatnonzero((grid[height:] < 100).any(1)).size >= capital
    save_samples(tmp_path / "grid.png", tiny, [""])
    picture = np.asarray(Image.open(tmp_path / "grid.png"))[:192, :192, 0]
    assert (picture[30:36, 42:48] == 255).all() and (picture == 255).sum() == 36


def box(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    return bytes(font.getmask(text))


def test_each_character_of_a_label_has_its_glyph(tmp_path, monkeypatch):
    """No two texts of one length look the same, as missing glyphs do; a text that no font has is found by its line."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in font_manager.fontManager.ttflist if "Noto" not in font.name])
    for text in ("a red cat", "рыжий кот", "κόκκινη γάτα", "chat réussi, “œuf” — 5 €", "mèo đỏ", "قطة حمراء", "→ ½ ♥"):
        font = media.font_of(text)
        missing = box(font, "\U0010ffff")
        assert all(box(font, character) != missing for character in text)
        assert (drawn(tmp_path, text) < 128).any()
    assert not np.array_equal(drawn(tmp_path, "рыжий"), drawn(tmp_path, "белый"))
    assert media.font_of("一只红色的猫") is None
    assert np.array_equal(drawn(tmp_path, "一只红色的猫"), drawn(tmp_path, "line 1 of grid.txt"))


def test_a_font_that_is_installed_is_used(monkeypatch):
    """As if it were Noto Sans: another font of matplotlib, and a character that DejaVu Sans lacks."""
    (stix,) = (font for font in font_manager.fontManager.ttflist if Path(font.fname).name == "STIXGeneral.ttf")
    text = "a" + chr(min(media._characters(stix.fname) - media._characters(font_manager.findfont("DejaVu Sans"))))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert media.font_of(text) is None
    noto = font_manager.FontEntry(fname=stix.fname, name="Noto Sans Math", weight=400)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [noto])
    assert media.font_of(text).path == stix.fname
    assert box(media.font_of(text), text[1]) != box(media.font_of(text), "\U0010ffff")


@pytest.mark.parametrize("text", ["", "a cat", "a red cat and a blue dog on a green hill", "кот " * 60, "x" * 300, "a " + "x" * 300])
@pytest.mark.parametrize("width", [60, 124, 400])
def test_labels_are_wrapped(text, width):
    text = text.strip()
    font = media.font_of(text)
    lines = media.wrap(text, font, width)
    assert 1 <= len(lines) <= 5 and all(font.getlength(line) <= width for line in lines)
    whole = "".join(lines).replace(" ", "")
    if whole.endswith("…"):
        assert len(lines) == 5 and text.replace(" ", "").startswith(whole[:-1])
        assert font.getlength(text) > 4 * width  # no line was left half empty, but for the word that did not fit
    else:
        assert whole == text.replace(" ", "")
    if "x" not in text:
        assert set(" ".join(lines).rstrip("…").split()) <= set(text.split())  # no word is broken


@pytest.mark.parametrize("clips", [False, True])
def test_the_gallery_shows_before_and_after(tmp_path, monkeypatch, clips):
    """The first prompts' pictures, or the first, third, fifth and last of seven frames, in their places."""
    before, after = torch.full((3, 7, 32, 32), -1.0), torch.linspace(-1, 1, 7)[None, :, None, None].expand(3, 7, 32, 32)
    for model, sample in (("base", before), ("trained", after)):
        for number in range(9):
            path = tmp_path / "pictures" / model / "prompts" / f"prompt{number:05d}_seed0_0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_video(path.with_suffix(".mp4"), sample, fps=8) if clips else to_pil(sample[None, :, 4])[0].save(path)
    rows = "".join(f"{model},{number},a prompt\n" for model in ("base", "trained") for number in range(9))
    (tmp_path / "scores.csv").write_text(f"model,prompt,text\n{rows}")
    monkeypatch.setattr(sys, "argv", ["gallery.py", str(tmp_path / "gallery.png"), f"a = b={tmp_path}"])
    runpy.run_path(str(REPOSITORY / "scripts" / "gallery.py"))["main"]()
    pixels = np.asarray(Image.open(tmp_path / "gallery.png").convert("L")).astype(int)
    for cell in range(8):
        x, y = 70 + cell * 98 + 48, 24 + 48
        grey = (0, 85, 170, 255)[cell % 4] if clips else 170
        assert pixels[y, x] <= 3 and abs(pixels[y + 98, x] - grey) <= 3
    assert (pixels[:24] < 128).any() and (pixels[24 + 2 * 98 :] < 128).any()
