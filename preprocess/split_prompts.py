"""Filter raw prompt lists and split them into a training and a held-out prompt file.

python preprocess/split_prompts.py --inputs FILE ... --output_dir DIR reads text, jsonl, json and csv, as HPDv2, VidProM and ConsisID are
published. DIR gets train.txt and heldout.txt (.jsonl if rows have more than a prompt), and report.json, which says what was dropped and
why. The same inputs and flags give the same bytes.
"""

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from any working directory

import tyro
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from tqdm import tqdm

from fastvideo.embeddings.prompts import CONTROL
from fastvideo.errors import UserError
from fastvideo.files import whole_folder
from fastvideo.parallel.distributed import run

FIELDS = ("prompt", "cap", "caption")
SCORES = ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")  # VidProM's columns, each 0 to 1
REASONS = ("empty", "broken", "too_short", "too_long", "toxic", "excluded", "duplicate", "language")
EXAMPLES = 5

# What a prompt may be mistaken for. Fewer languages are told apart better: of all 139, "a cat" is most likely Galician.
LANGUAGES = ("ar", "cs", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl", "pl", "pt", "ro",
             "ru", "sv", "th", "tr", "uk", "vi", "zh")  # fmt: skip
# A prompt without any hint has probability 1 / 27 in each. Names and styles ("mona lisa", "opal dragon") look foreign, but stay above this.
LEAST_PROBABILITY = 0.02


@dataclass
class Args:
    """Filter raw prompt lists and split them into a training and a held-out prompt file."""

    inputs: tuple[Path, ...]
    """Files of prompts: .txt, a prompt a line; .jsonl, .json, a list of strings or objects; .csv with a header."""
    output_dir: Path
    """Folder for train, heldout and report.json. New or empty, unless --overwrite."""
    format: Literal["auto", "text", "jsonl", "json", "csv"] = "auto"
    """Of the inputs; auto: by the end of each file's name."""
    field: str | None = None
    """Key or column of the prompt. Default: the first of prompt, cap and caption that the file has."""
    exclude: tuple[Path, ...] = ()
    """Files of prompts that must be in neither output, such as a benchmark's."""
    heldout: int = 1000
    """Prompts held out."""
    train: int | None = None
    """Most prompts to train on. Default: all the others."""
    seed: int = 0
    """Of the order, and so of which prompts are held out."""
    language: str = "en"
    """Code of the prompts' language, such as en, de or zh; any: all are kept."""
    min_words: int = 3
    """Words a prompt must have at least."""
    max_words: int = 256
    """Words a prompt may have at most."""
    max_chars: int = 2000
    """Characters a prompt may have at most; the only limit of length for languages without spaces."""
    max_toxicity: float | None = None
    """Highest allowed of VidProM's six scores (toxicity, ..., sexual_explicit), from 0 to 1. Default: no limit."""
    overwrite: bool = False
    """Replace the files of an earlier run in --output_dir."""

    def __post_init__(self) -> None:
        if self.heldout < 0:
            raise UserError(f"--heldout must not be negative, but is {self.heldout}")
        if self.train is not None and self.train < 1:
            raise UserError(f"--train must be at least 1, not {self.train}")
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(f"--min_words must be from 1 to --max_words, but they are {self.min_words} and {self.max_words}")
        if self.max_chars < 1:
            raise UserError(f"--max_chars must be at least 1, not {self.max_chars}")
        if self.max_toxicity is not None and not 0 <= self.max_toxicity <= 1:
            raise UserError(f"--max_toxicity must be from 0 to 1, not {self.max_toxicity}")
        if self.language not in (*LANGUAGES, "any"):
            raise UserError(f"--language must be any or one of {' '.join(LANGUAGES)}, not {self.language!r}")


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    output_dir = args.output_dir.resolve()
    check_output(output_dir, args.overwrite)
    excluded = {digest(prompt, args.seed) for path in args.exclude for prompt, _, _ in read_rows(path, "auto", None, output_dir)}
    is_wanted = language_filter(args.language)

    dropped = {reason: {"count": 0, "examples": []} for reason in REASONS}
    prompts: dict[bytes, list[dict]] = {}  # by digest; several rows only if they differ in "image"
    foreign = set()  # digests
    inputs = []
    for path in args.inputs:
        number = 0
        for number, (prompt, further, toxicity) in enumerate(read_rows(path, args.format, args.field, output_dir), start=1):
            if args.max_toxicity is not None and toxicity is None:
                raise UserError(
                    f"--max_toxicity needs the columns {', '.join(SCORES)} with numbers, but entry {number} of {path} lacks them"
                )
            key = digest(prompt, args.seed)
            rows = prompts.get(key, [])
            words = len(prompt.split())
            written = prompt + json.dumps(further, ensure_ascii=False)
            if not normalise(prompt):
                reason = "empty"
            elif "\ufffd" in prompt or CONTROL[".txt"].search(prompt) or any("\ud800" <= character <= "\udfff" for character in written):
                reason = "broken"
            elif words < args.min_words:
                reason = "too_short"
            elif words > args.max_words or len(prompt) > args.max_chars:
                reason = "too_long"
            elif args.max_toxicity is not None and not toxicity <= args.max_toxicity:
                reason = "toxic"
            elif key in excluded:
                reason = "excluded"
            elif key in foreign or any(row.get("image") == further.get("image") for row in rows):
                reason = "duplicate"
            elif not rows and not is_wanted(prompt):
                reason = "language"
                foreign.add(key)
            else:
                prompts.setdefault(key, rows).append({"prompt": prompt, **further})
                continue
            dropped[reason]["count"] += 1
            if len(dropped[reason]["examples"]) < EXAMPLES:
                dropped[reason]["examples"].append(f"{path.name}, {number}: {prompt[:100]}")
        inputs.append({"path": str(path), "prompts": number})

    if len(prompts) <= args.heldout:
        counts = ", ".join(f"{entry['count']} {reason}" for reason, entry in dropped.items() if entry["count"])
        raise UserError(f"{len(prompts)} prompts are left, but --heldout is {args.heldout}: none to train on (dropped: {counts or 'none'})")
    # Sorted by digest: a shuffle in which a prompt's place depends on the seed and its own words only, not on the order of the inputs.
    order = sorted(prompts)
    end = None if args.train is None else args.heldout + args.train
    parts = {"train": order[args.heldout : end], "heldout": order[: args.heldout]}
    files = {name: [row for key in keys for row in prompts[key]] for name, keys in parts.items() if keys}
    suffix = ".jsonl" if any(row.keys() != {"prompt"} for rows in files.values() for row in rows) else ".txt"
    report = {
        "arguments": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "overwrite")},
        "inputs": inputs,
        "read": sum(entry["prompts"] for entry in inputs),
        "dropped": dropped,
        "kept": sum(len(rows) for rows in prompts.values()),
        "written": {name + suffix: len(rows) for name, rows in files.items()},
        "left_over_by_train_limit": sum(len(prompts[key]) for key in ([] if end is None else order[end:])),
    }
    with whole_folder(output_dir) as folder:
        for name, rows in files.items():
            lines = (row["prompt"] if suffix == ".txt" else json.dumps(row, ensure_ascii=False) for row in rows)
            (folder / (name + suffix)).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")

    print(f"{report['read']} prompts read, {report['kept']} kept")
    for reason, entry in dropped.items():
        if entry["count"]:
            print(f"  {entry['count']} {reason.replace('_', ' ')}, such as {entry['examples'][0]!r}")
    for name, count in report["written"].items():
        print(f"{args.output_dir / name}: {count} prompts")


def normalise(prompt: str) -> str:
    """What two prompts must share to be the same: letters and words, not case, spaces, width of characters or punctuation at the end."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(".,;:!? ")


def digest(prompt: str, seed: int) -> bytes:
    """16 bytes that stand for the normalised prompt, in an order that the seed shuffles."""
    return blake2b(f"{seed}\n{normalise(prompt)}".encode(errors="surrogatepass"), digest_size=16).digest()


@cache  # loading takes a second
def language_filter(language: str) -> Callable[[str], bool]:
    """A function that tells whether a prompt may be in this language; in doubt, as with most prompts of two words, it may."""
    if language == "any":
        return lambda prompt: True
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return lambda prompt: dict(identifier.rank(prompt.lower()))[language] >= LEAST_PROBABILITY


def check_output(output_dir: Path, overwrite: bool) -> None:
    """Raises UserError if the folder holds anything, or, to overwrite, anything that this script does not write."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file")
    names = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
    foreign = [name for name in names if name not in ("train.txt", "train.jsonl", "heldout.txt", "heldout.jsonl", "report.json")]
    if names and not overwrite:
        raise UserError(f"--output_dir {output_dir} holds {names[0]}: choose another folder, or --overwrite")
    if foreign:
        raise UserError(f"--overwrite replaces the folder {output_dir}, but it also holds {foreign[0]}: choose another folder")


def read_rows(path: Path, file_format: str, field: str | None, output_dir: Path) -> Iterator[tuple[str, dict, float | None]]:
    """Of each entry: its prompt, with single spaces for white space; a jsonl's further fields; the highest of VidProM's scores, if any.

    A relative "image" path, which counts from the file, is changed to count from `output_dir`.
    """
    if file_format == "auto":
        file_format = {".txt": "text", ".jsonl": "jsonl", ".json": "json", ".csv": "csv"}.get(path.suffix.lower())
        if file_format is None:
            raise UserError(f"{path} ends in none of .txt, .jsonl, .json and .csv: say its --format")
    entries = read_entries(path, file_format)
    first = next(entries, None)
    if first is None:
        raise UserError(f"{path} holds no prompts")
    field = field or next((name for name in FIELDS if name in first), FIELDS[0])
    if field not in first:
        raise UserError(f"{path} has no {field!r} in its first entry, only {', '.join(map(repr, first))}: name the prompts' --field")
    for number, entry in enumerate(chain([first], entries), start=1):
        prompt = entry.pop(field, None)
        if not isinstance(prompt, str | None):
            raise UserError(f"entry {number} of {path} has no text as {field!r}, but {str(prompt)[:60]}")
        try:
            toxicity = max(float(entry[name]) for name in SCORES)
        except (KeyError, TypeError, ValueError):
            toxicity = None
        further = entry if file_format == "jsonl" else {}
        if isinstance(further.get("image"), str) and not os.path.isabs(further["image"]):
            further["image"] = os.path.relpath(path.resolve().parent / further["image"], output_dir)
        yield " ".join((prompt or "").split()), further, toxicity


def read_entries(path: Path, file_format: str) -> Iterator[dict]:
    """The entries of a file as dicts, a plain string as {"prompt": string}; text, jsonl and csv as they are read. With a progress bar."""
    number = 0
    try:
        with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=1) as progress:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if file_format == "csv" else "\n")
            if file_format == "csv":
                entries = csv.DictReader(text, strict=True)
            elif file_format == "json":
                entries = json.load(text)
                if not isinstance(entries, list):
                    raise UserError(f"{path} must be a list of prompts, not {type(entries).__name__}")
            else:
                entries = (json.loads(line) if file_format == "jsonl" and line.strip() else line for line in text)
            for number, entry in enumerate(entries, start=1):
                progress.update(file.tell() - progress.n)
                entry = {"prompt": entry} if isinstance(entry, str) else entry
                if not isinstance(entry, dict):
                    raise UserError(f"entry {number} of {path} must be a string or an object, not {str(entry)[:60]}")
                yield entry
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"cannot read {path} as {file_format}, after entry {number}: {error}") from error


if __name__ == "__main__":
    run(main)
