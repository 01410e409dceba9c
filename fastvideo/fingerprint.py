"""Which encoders made an embedding cache, and whether a model folder has the same ones."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastvideo.distributed import UserError, on_main, warn
from fastvideo.embedding_cache import EmbeddingCache, refuse_difference


def encoder_fingerprint(model_dir: str | Path, subfolders: tuple[str, ...], **settings: str | int) -> dict[str, str | int]:
    """What embeddings depend on: {subfolder: "sha256:..." of the names and contents of its files (hidden ones apart), ..., **settings}.

    Raises UserError for a subfolder of encoder or tokenizer files that is missing, empty or unreadable.
    """
    fingerprint = {}
    for folder in [Path(model_dir) / subfolder for subfolder in subfolders]:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if "/." not in f"/{name}"]
        if not names:
            raise UserError(f"{folder} is missing or empty: the model folder must have {', '.join(subfolders)}")
        try:
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(_sha256, [folder / name for name in names]))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        listing = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests))
        fingerprint[folder.name] = "sha256:" + hashlib.sha256(listing.encode()).hexdigest()
    return fingerprint | settings


def check_encoder(cache: EmbeddingCache, model_dir: str | Path) -> None:
    """Collective. UserError unless the encoders in `model_dir` are those that made the cache: all whose checksums are in its fingerprint.

    Only a printed warning for text encoders and tokenizers if it holds none of them.
    """
    subfolders = tuple(name for name, value in cache.fingerprint.items() if str(value).startswith("sha256:"))
    of_text = tuple(name for name in subfolders if name.startswith(("text_encoder", "tokenizer")))

    def check() -> None:
        if not Path(model_dir).is_dir():
            raise UserError(f"--model: model folder {model_dir} does not exist")
        has_text = any((Path(model_dir) / name).exists() for name in of_text)
        checked = tuple(name for name in subfolders if has_text or name not in of_text)
        refuse_difference(cache.path, cache.fingerprint, encoder_fingerprint(model_dir, checked), str(model_dir))
        if not has_text:
            warn(f"{model_dir} holds no text encoders, so {cache.path} cannot be checked against them")

    on_main(check)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
