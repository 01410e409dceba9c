"""Which colour an object has, as GenEval asks CLIP; see geneval.py, which says where its numbers and words are from."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastvideo.rewards.clip import load_clip_folder
from fastvideo.rewards.detectors import Detection
from fastvideo.rewards.open_clip import find_weights, load_open_clip

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CAPTIONS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = (0x99, 0x99, 0x99)  # around an object's mask


class ColourNames:
    """Zero-shot classification of an object's colour by CLIP: the colour whose captions, averaged, are nearest to the object's picture.

    That is its box cut out of the picture, in which all but its mask is GREY, if it has one.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        weights = find_weights(path)
        parts = load_open_clip("geneval,clip", weights) if weights else load_clip_folder("geneval,clip", path)
        self.model, self.tokenize, self.prepare = parts
        self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.captions: dict[str, torch.Tensor] = {}  # of a class: (colours, width)

    def __call__(self, objects: list[Detection], name: str, picture: Image.Image) -> list[str]:
        """The colours of objects of the class `name`."""
        pixels = torch.cat([self.prepare(cut_out(one, picture).to(self.device)) for one in objects])
        images = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        nearest = (F.normalize(images, dim=-1) @ self.of_captions(name).T).argmax(1)
        return [COLOURS[i] for i in nearest.tolist()]

    def of_captions(self, name: str) -> torch.Tensor:
        if name not in self.captions:
            texts = [caption.format(colour=colour, name=name) for colour in COLOURS for caption in CAPTIONS]
            tokens = {key: value.to(self.device) for key, value in self.tokenize(texts).items()}
            features = F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)
            self.captions[name] = F.normalize(features.view(len(COLOURS), len(CAPTIONS), -1).mean(1), dim=-1)
        return self.captions[name]


def cut_out(one: Detection, picture: Image.Image) -> torch.Tensor:
    """An object as CLIP is shown it: (1, 3, h, w) in [-1, 1]. A box narrower than a pixel is as wide as one."""
    if one.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, GREY), Image.fromarray(one.mask))
    left, top, right, bottom = (round(side) for side in one.box)
    crop = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 127.5 - 1
