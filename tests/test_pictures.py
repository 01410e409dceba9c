"""Pictures of users: what they show, whatever their format, or a sentence that says why not."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fastvideo.embeddings.encoders import read_image
from fastvideo.errors import UserError
from fastvideo.rewards.wire import unpack

GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # (64, 64), black to white


def transparent(mode: str) -> Image.Image:
    """Red, and hidden under the transparency of the right half black."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8)).convert("P")
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("name", ["g.png", "g.tiff"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / name)
    assert (np.asarray(read_image(tmp_path / name)) == GREY[..., None]).all()


@pytest.mark.parametrize(("name", "mode"), [("t.png", "RGBA"), ("t.webp", "RGBA"), ("t.gif", "P"), ("p.png", "P"), ("t.tiff", "RGBA")])
def test_transparent_pictures_are_laid_on_white(tmp_path, name, mode):
    options = {"lossless": True} if name.endswith("webp") else {}
    transparent(mode).save(tmp_path / name, **options)
    pixels = np.asarray(read_image(tmp_path / name))
    assert (pixels[:, :32] == (255, 0, 0)).all() and (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize(
    ("name", "image", "pixel"),
    [
        ("la.png", Image.new("LA", (8, 8), (0, 51)), 204),  # a fifth of black over white
        ("one.png", Image.new("1", (8, 8), 1), 255),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_other_modes(tmp_path, name, image, pixel):
    image.save(tmp_path / name)
    assert np.abs(np.asarray(read_image(tmp_path / name)).astype(int) - pixel).max() <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(GREY.astype(dtype)).save(tmp_path / "f.tiff")
    with pytest.raises(UserError, match=r"image .*f\.tiff cannot be read: its pixels have 32 bits"):
        read_image(tmp_path / "f.tiff")


@pytest.mark.parametrize(("image", "expected"), [(Image.fromarray(GREY.astype(np.uint16) * 257), GREY), (transparent("RGBA"), None)])
def test_the_reward_server_sees_the_same(tmp_path, image, expected):
    body = BytesIO()
    image.save(body, format="PNG")
    media, _ = unpack(body.getvalue(), "image/png", "a red circle", 1e6)
    if expected is None:
        assert (media[0, :, :, 32:] == 255).all() and (media[0, 1:, :, :32] == 0).all()
    else:
        assert (media[0].numpy() == expected).all()
