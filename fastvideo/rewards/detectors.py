"""Object detectors, which say what is where in a picture: a folder of transformers', the shapes world's checker, or a user's own.

A detector is a function `detect(pictures)`, of PIL pictures in RGB, which returns a list of `Detection` for each. If it has the attribute
`classes`, those are all the names it may give; if it has `colours`, it judges colours, and those are all it may say.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastvideo.errors import UserError, first_line
from fastvideo.rewards.names import split_file
from fastvideo.rewards.plugins import load_function

DETECTORS = {"shapes": "shapes.geneval:load_detector"}  # name -> MODULE:LOADER
MASKED = ("mask2former", "maskformer")  # model types whose queries have masks
MAX_QUERIES = 100  # of a picture, by score: as mmdetection's configuration of Mask2Former has it ("max_per_image")


@dataclass(frozen=True)
class Detection:
    """An object found in a picture.

    name: its class. box: left, top, right, bottom in pixels. mask: (H, W) bool of the whole picture, None if there is none.
    colour: one of the detector's `colours`, None if it does not judge them.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    colour: str | None = None


Detector = Callable[[list[Image.Image]], list[list[Detection]]]


def load_detector(path: str, device: torch.device, weights: str | None, side: int, threshold: float) -> Detector:
    """The detector that `path` names: one of DETECTORS, FILE.py:FUNCTION, or a folder.

    A user's function loads his detector: it is called as `load(path, device)`, with `weights` as its path, and returns `detect`.
    side, threshold: of a folder's, see `load_folder`. Raises UserError for whatever can't be loaded.
    """
    file, function = split_file(path)
    if weights is not None and not file:
        raise UserError(f"--rewards: geneval={path} has weights={weights}, which only a detector of your own, FILE.py:FUNCTION, takes")
    if path in DETECTORS:
        module, _, name = DETECTORS[path].partition(":")
        try:
            return getattr(importlib.import_module(module), name)(None, device)
        except ImportError as error:
            raise UserError(f"--rewards: geneval={path} cannot be imported: {error}") from error
    if file:
        return load_function(file, function)(weights, device)
    return load_folder(path, device, side, threshold)


def load_folder(path: str, device: torch.device, side: int, threshold: float) -> Detector:
    """The detector of a folder in transformers' format: AutoModelForObjectDetection, or MaskFormer and Mask2Former for instances.

    Its classes are the names in config.json's id2label. It computes in float32; pictures of one call must have one size.
    side: of the shorter side of pictures as they are shown to it, of the longer one 5/3 of it at most; 0 for what preprocessor_config.json
        says. threshold: detections have scores above it.
    """
    if not (Path(path) / "config.json").is_file():
        what = "the folder has no config.json" if Path(path).is_dir() else "there is no such folder"
        raise UserError(f"--rewards: geneval={path}: {what}; a detector is {', '.join(DETECTORS)}, FILE.py:FUNCTION or a folder")
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        masked = config.model_type in MASKED
        model_class = AutoModelForUniversalSegmentation if masked else AutoModelForObjectDetection
        model, report = model_class.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        size = {"size": {"shortest_edge": side, "longest_edge": side * 5 // 3}} if side else {}
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True, **size)  # the other needs torchvision
    except Exception as error:  # transformers raises all sorts
        raise UserError(f"--rewards: geneval={path} can't be read as a detector: {type(error).__name__}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(
            f"--rewards: geneval={path} lacks {len(report['missing_keys'])} weights of a {type(model).__name__}, "
            f"such as {sorted(report['missing_keys'])[0]}"
        )
    model.to(device).eval().requires_grad_(False)
    known = set(inspect.signature(model.forward).parameters)

    @torch.no_grad()
    def detect(pictures: list[Image.Image]) -> list[list[Detection]]:
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        outputs = model(**{key: value for key, value in inputs.items() if key in known})
        size = pictures[0].height, pictures[0].width
        if masked:
            shown = tuple(inputs["pixel_mask"][0].any(dim).sum().item() for dim in (1, 0))  # height and width without the padding
            padded = inputs["pixel_values"].shape[2:]
            parts = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
            found = [instances(classes, masks, padded, shown, size, threshold) for classes, masks in parts]
        else:
            found = processor.post_process_object_detection(outputs, threshold, [size] * len(pictures))
        return [_detections(one, config.id2label, size) for one in found]

    detect.classes = set(config.id2label.values())
    return detect


def instances(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    shown: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> dict[str, torch.Tensor]:
    """Objects of one picture, by the rules of mmdetection's Mask2Former, which GenEval runs: "scores", "labels", "boxes" and "masks".

    class_logits: (queries, classes + 1), the last of which is "nothing". mask_logits: (queries, h, w), of the picture of size `shown`, with
    padding to the right and below up to `padded`. A score is the class's probability times the mean probability inside of the mask; a query
    may be several classes. Masks are of the picture's own `size`, boxes around them.

    transformers' own post_process_instance_segmentation has the same scores of masks of 384 x 384, whatever the picture's sides.
    """
    scores = class_logits.softmax(-1)[:, :-1]
    scores, chosen = scores.flatten().topk(min(MAX_QUERIES, scores.numel()))
    queries, labels = chosen // (class_logits.shape[1] - 1), chosen % (class_logits.shape[1] - 1)
    likely = scores > threshold  # the masks' factor only makes them smaller
    scores, queries, labels = scores[likely], queries[likely], labels[likely]
    masks = mask_logits[queries][None]
    if len(queries):
        masks = F.interpolate(masks, padded, mode="bilinear")[:, :, : shown[0], : shown[1]]
        masks = F.interpolate(masks, size, mode="bilinear")
    masks = masks[0]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    kept = scores > threshold
    return {"scores": scores[kept], "labels": labels[kept], "masks": inside[kept], "boxes": _boxes(inside[kept])}


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """(n, H, W) bool, none of them empty -> (n, 4): left, top, and the ends to the right and below, one behind the last pixel."""
    sides = []
    for dim in (1, 2):  # over rows, which leaves columns, then over columns
        hit = masks.any(dim).int()
        sides.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()


def _detections(found: dict[str, torch.Tensor], names: dict[int, str], size: tuple[int, int]) -> list[Detection]:
    height, width = size
    boxes = found["boxes"].clamp(min=0).minimum(found["boxes"].new_tensor([width, height, width, height])).tolist()
    masks = found["masks"].cpu().numpy() if "masks" in found else [None] * len(boxes)
    parts = zip(found["scores"].tolist(), found["labels"].tolist(), boxes, masks, strict=True)
    return [Detection(names[label], score, tuple(box), mask) for score, label, box, mask in parts]
