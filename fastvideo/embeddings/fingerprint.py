"""Which encoders made an embedding cache, and whether a model folder has the same ones."""

import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from fastvideo.embeddings.cache import EmbeddingCache, refuse_difference
from fastvideo.errors import UserError, warn
from fastvideo.models.tokenizers import own_digest
from fastvideo.parallel.distributed import on_main

SETTINGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
SETTINGS += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")  # read where there is no tokenizer.json
REMEMBERED = 2**24  # bytes from which on a checksum is remembered: less is read in no time


def encoder_fingerprint(model_dir: str | Path, subfolders: tuple[str, ...], **settings: str | int) -> dict[str, str | int]:
    """What embeddings depend on: {subfolder: "sha256:..." of the names and contents of the files that are loaded, ..., **settings}.

    Raises UserError for a subfolder of encoder or tokenizer files that is missing, empty or unreadable.
    """
    fingerprint = {}
    for folder in [Path(model_dir) / subfolder for subfolder in subfolders]:
        try:
            names = loaded_files(folder)
            if not names:
                raise UserError(f"{folder} is missing or empty: the model folder must have {', '.join(subfolders)}")
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(_sha256, [folder / name for name in names]))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        listing = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests))
        fingerprint[folder.name] = "sha256:" + hashlib.sha256(listing.encode()).hexdigest()
    return fingerprint | settings


def content_digest(path: Path) -> str:
    """The "sha256:..." of a file's contents, or of names and contents of all files below a folder. UserError for what cannot be read."""
    try:
        if path.is_file():
            return "sha256:" + _sha256(path)
        listing = "".join(f"{file.relative_to(path)} {_sha256(file)}\n" for file in sorted(path.rglob("*")) if file.is_file())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return "sha256:" + hashlib.sha256(listing.encode()).hexdigest()


def loaded_files(folder: Path) -> list[str]:
    """The names of the files that diffusers and transformers read in `folder`: settings, vocabulary, safetensors.

    Not what may lie beside them, such as .bin files, fp16 variants or a README. Raises UserError for a broken index of shards.
    """
    names = [*SETTINGS, *(() if (folder / "tokenizer.json").is_file() else VOCABULARIES)]
    for weights in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        names += [weights, f"{weights}.index.json"]
        index = folder / names[-1]
        if index.is_file():
            try:
                names += set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UserError(f"{index} is damaged ({type(error).__name__}: {error})") from error
    return sorted(name for name in names if (folder / name).is_file())


def check_encoder(cache: EmbeddingCache, model_dir: str | Path) -> None:
    """Collective. UserError unless the encoders in `model_dir` are those that made the cache: all whose checksums are in its fingerprint,
    and its text was read as the tokenizers there should read it.

    Only a printed warning for text encoders and tokenizers if it holds none of them.
    """
    subfolders = tuple(name for name, value in cache.fingerprint.items() if str(value).startswith("sha256:"))
    of_text = tuple(name for name in subfolders if name.startswith(("text_encoder", "tokenizer")))

    def check() -> None:
        if not Path(model_dir).is_dir():
            raise UserError(f"--model: model folder {model_dir} does not exist")
        has_text = any((Path(model_dir) / name).exists() for name in of_text)
        checked = tuple(name for name in subfolders if has_text or name not in of_text)
        tokenizers = [name for name in checked if name.startswith("tokenizer")]
        if tokenizers:
            refuse_difference(cache.path, cache.fingerprint, {"token_ids": own_digest(model_dir, tokenizers)}, str(model_dir))
        refuse_difference(cache.path, cache.fingerprint, encoder_fingerprint(model_dir, checked), str(model_dir))
        if not has_text:
            warn(f"{model_dir} holds no text encoders, so {cache.path} cannot be checked against them")

    on_main(check)


def _sha256(path: Path) -> str:
    """The checksum of a file's contents, in hexadecimal; that of a large file is read once, and remembered with its size and times.

    A note of its own in the user's cache folder for each: whole or absent, whoever else writes it, and left out where nobody may write.
    """
    path, state = path.resolve(), path.stat()
    key = json.dumps([str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastvideo" / "sha256"
    note = folder / hashlib.sha256(key.encode()).hexdigest()
    remembered = state.st_size >= REMEMBERED and folder.is_absolute()
    if remembered:
        with suppress(OSError):
            found = note.read_bytes().decode(errors="replace")
            if re.fullmatch("[0-9a-f]{64}", found):
                return found
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if remembered:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder) as temporary:  # removed if it cannot be written
                temporary.write(digest)
                temporary.flush()
                os.replace(temporary.name, note)
    return digest
