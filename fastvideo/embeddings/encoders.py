"""What the embedding scripts share: how a run starts, a pipeline of encoders only, the report on the prompts, reference images.

A script ends the rows of a model that is guided by its own prediction without a prompt with `UNCONDITIONAL`, which training finds as
`EmbeddingCache.unconditional`.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from diffusers import DiffusionPipeline
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastvideo.errors import UserError, first_line
from fastvideo.media import to_rgb
from fastvideo.models.pretrained import reading
from fastvideo.models.tokenizers import load_tokenizers
from fastvideo.parallel.distributed import Ranks, compute_dtype, init

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # of pictures; PIL would run Ghostscript on a PostScript file
UNCONDITIONAL = {"prompt": ""}  # no row of `read_prompts` has an empty prompt


def start(model_dir: str, dtype: str, **at_least_one: int) -> tuple[Ranks, torch.dtype]:
    """Collective: the processes, and the dtype of encoders and cache; "auto" is bfloat16 on a GPU, else float32.

    Raises UserError for a --model folder that does not exist and for numbers below 1, which are given by the names of their flags.
    """
    for flag, value in at_least_one.items():
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    if not Path(model_dir).is_dir():
        raise UserError(f"--model: there is no folder {model_dir}")
    ranks = init()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    return ranks, compute_dtype(dtype, ranks.device)


def load_encoders(pipeline_class: type[DiffusionPipeline], model_dir: str, **components: Any) -> DiffusionPipeline:
    """The pipeline on the CPU, with the loaded `components` (None for what is not needed) and the tokenizers and scheduler in the folder.

    Raises UserError for a folder or file that is missing or broken, and for a tokenizer whose ids are not those of its files.
    """
    with reading(Path(model_dir), f"--model: {model_dir} cannot be loaded as {pipeline_class.__name__}"):
        components |= load_tokenizers(model_dir, "--model")
        return pipeline_class.from_pretrained(model_dir, local_files_only=True, use_safetensors=True, **components)


def in_template(tokenizer: PreTrainedTokenizerBase, template: dict) -> Callable[[list[str]], list[list[int]]]:
    """Prompts to the token ids that a pipeline keeps of them in its `template`: those after the first "crop_start".

    Raises UserError if the tokenizer makes another number of tokens of what comes before the prompt.
    """
    before = len(tokenizer(template["template"].split("{}")[0]).input_ids)
    if before != template["crop_start"]:
        raise UserError(
            f"--model: {tokenizer.name_or_path} makes {before} tokens of what comes before the prompt in the pipeline's template, of which "
            f"it cuts {template['crop_start']}: it is not the model's own tokenizer"
        )
    return lambda prompts: [ids[before:] for ids in tokenizer([template["template"].format(prompt) for prompt in prompts]).input_ids]


def report_prompts(
    rows: list[dict], report: dict[str, list[int]], tokenize: Callable[[list[str]], list[list[int]]], max_tokens: int, ranks: Ranks
) -> None:
    """Print which lines of a prompt file were skipped or dropped, and which have more than `max_tokens` tokens and are cut.

    rows, report: of `read_prompts`. tokenize: prompts to their token ids.
    """
    diffusers.logging.set_verbosity_error()  # both libraries would warn of each long prompt; this names them all at once
    transformers.logging.set_verbosity_error()
    token_ids = tokenize([row["prompt"] for row in rows])
    over_long = [line for line, ids in zip(report["lines"], token_ids, strict=True) if len(ids) > max_tokens]
    if ranks.is_main:
        for what, lines in (
            ("empty lines skipped", report["empty"]),
            ("duplicates dropped", report["duplicates"]),
            (f"prompts cut at {max_tokens} tokens", over_long),
        ):
            listed = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
            print(f"{len(lines)} {what}" + (f": line {listed}" if lines else ""), flush=True)


def check_images(rows: list[dict], lines: list[int], prompts: str, size: tuple[int, int] | None) -> list[dict]:
    """The rows with the checksum of what `read_image` makes of "image" as "pixels_sha256": with other pixels it is another row.

    lines: the rows' lines in the file `prompts`. size: width and height in pixels, or None if any will do. Raises UserError, naming the
    line, for a picture that is missing, broken or of another size.
    """

    def checked(row: dict, line: int) -> dict:
        image = read_image(row["image"], f"line {line} of {prompts}: ")
        width, height = image.size
        if size is not None and image.size != size:
            raise UserError(
                f"line {line} of {prompts}: image {row['image']} is {width} x {height} pixels, not {size[0]} x {size[1]} as --width and "
                "--height say; --resize would stretch it to that"
            )
        return row | {"pixels_sha256": hashlib.sha256(f"{width} x {height}".encode() + image.tobytes()).hexdigest()}

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(checked, rows, lines), "checking images", len(rows), delay=2, leave=False))


def read_image(path: str, where: str = "") -> PIL.Image.Image:
    """The picture as `to_rgb` makes it. Raises UserError, beginning with `where`, if it cannot be read."""
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as error:  # what PIL's readers raise for a broken file is not documented
        raise UserError(f"{where}image {path} cannot be read: {first_line(error)}") from error
