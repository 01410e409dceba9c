"""What evaluate.py runs: a benchmark is prompts, the rewards that score them, and how its samples become one number.

`parse_benchmark` makes those that have a name in BENCHMARKS: docs/evaluation_benchmarks.md
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError
from fastvideo.rewards import parse_rewards
from fastvideo.rewards.names import WORDS, find_loader, option_defaults, split_options

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPS-v2's benchmark: STYLE.json each
FORM = "NAME=PATH[,OPTION=VALUE...]"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, loaded: `evaluate.py` samples `images_per_prompt` of each row for each noise seed and scores them.

    rows: of the prompt file, each with "prompt" and what the rewards read; a published one may have a prompt twice. rewards: as `--rewards`
    takes them. group: the rows' field by which scores are reported apart too (a style, a kind of question), if any.
    total: the number of the whole: the mean over all samples, or the mean of the groups' means.
    """

    name: str
    rows: list[dict]
    rewards: tuple[str, ...]
    images_per_prompt: int
    group: str | None = None
    total: Literal["samples", "groups"] = "samples"


@dataclass(frozen=True)
class Kind:
    """What a name stands for. rewards: their names. option: the one whose value is their path, if they take one, and what that is.

    read: the rows of a path. reward_options: given to the rewards unless the user says otherwise. Others as in `Benchmark`.
    """

    rewards: tuple[str, ...]
    option: tuple[str, str] | None
    read: Callable[[str], list[dict]]
    images_per_prompt: int = 1
    group: str | None = None
    reward_options: dict[str, str] = field(default_factory=dict)


def parse_benchmark(text: str) -> Benchmark:
    """`"geneval=evaluation_metadata.jsonl,detector=shapes"` -> its Benchmark, whose prompts are read and whose rewards are not loaded.

    Options are `images`, the pictures of a prompt, that which BENCHMARKS has for the name, and the rewards' own. The whole is the mean of
    the groups' means where there are groups, as published. Raises UserError as `parse_rewards` does, and as `read_prompts` does.
    """
    match = WORDS.fullmatch(text)
    kind = BENCHMARKS.get(match["name"]) if match else None
    if kind is None or not match["path"] or match["threshold"]:
        raise UserError(f"benchmark {text!r} is not of the form {FORM}, where the names are {', '.join(BENCHMARKS)}")
    try:
        options = kind.reward_options | split_options(match["options"], text)
        of_rewards = (name for reward in kind.rewards for name in option_defaults(find_loader(reward, None)))
        known = dict.fromkeys([*(kind.option or ())[:1], "images", *of_rewards])
        if unknown := [option for option in options if option not in known]:
            raise UserError(f"unknown option {unknown[0]!r}; {match['name']} knows {', '.join(known)}")
        images = options.pop("images", str(kind.images_per_prompt))
        if not images.isdecimal() or int(images) < 1:
            raise UserError(f"images={images} is not a whole number above 0")
        path = ""
        if kind.option:
            name, what = kind.option
            if not options.get(name):
                raise UserError(f"it needs the option {name}={what}")
            path = f"={options.pop(name)}"
        rewards = tuple(reward + path + "".join(f",{key}={value}" for key, value in options.items()) for reward in kind.rewards)
        parse_rewards(rewards)
        rows = kind.read(match["path"])
    except UserError as error:
        raise UserError(f"benchmark {text!r}: {str(error).removeprefix('--rewards: ')}") from error
    total = "groups" if kind.group else "samples"
    return Benchmark(match["name"], rows, rewards, int(images), kind.group, total)


def read_rows(path: str) -> list[dict]:
    """Of a prompt file. Rows are told apart by their prompts and, where they have them, images."""
    rows, _ = read_prompts(path)
    return read_prompts(path, ("prompt", "image"))[0] if "image" in rows[0] else rows


def read_styles(path: str) -> list[dict]:
    """Of the folder with HPS-v2's four lists of prompts. All of each list count, those that stand in it twice as well."""
    rows = []
    for style in STYLES:
        file = Path(path) / f"{style}.json"
        try:
            prompts = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} can't be read: {error}; hpsv2 needs a folder with {', '.join(STYLES)}.json") from error
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise UserError(f"{file} is not a list of prompts")
        rows += [{"prompt": prompt, "style": style} for prompt in prompts]
    return rows


def read_questions(path: str) -> list[dict]:
    """Of GenEval's evaluation_metadata.jsonl. The reward checks what else they need."""
    return read_prompts(path, ("prompt", "tag"))[0]


BENCHMARKS = {
    "hpsv2": Kind(("hpsv2",), ("weights", "HPS_v2.1_compressed.pt"), read_styles, group="style"),
    "clip": Kind(("clip",), ("model", "FOLDER"), read_rows),
    "pickscore": Kind(("pickscore",), ("model", "FOLDER"), read_rows),
    "ocr": Kind(("ocr",), None, read_rows),
    # norm=0: ratings as published, not normalised as in training
    "videoalign": Kind(("videoalign.vq", "videoalign.mq", "videoalign.ta"), ("model", "FOLDER"), read_rows, reward_options={"norm": "0"}),
    "geneval": Kind(("geneval",), ("detector", "shapes, FOLDER or FILE.py:FUNCTION"), read_questions, images_per_prompt=4, group="tag"),
    "visionreward": Kind(("http.visionreward",), ("server", "http://HOST:PORT"), read_rows),
}
