"""Loading diffusers and transformers folders from disk, strictly: what is missing or broken is said, never left random."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastvideo.distributed import UserError


def first_line(error: Exception) -> str:
    """What an error of diffusers or transformers says, without the pages that may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_pretrained(model_class: Any, folder: str | Path, subfolder: str, flag: str = "--model", **options: Any) -> Any:
    """`model_class.from_pretrained(folder, subfolder=subfolder, **options)`, from disk only.

    Raises UserError, naming the flag and the folder, if it is missing or broken or if weights are missing, unexpected or of another shape.
    """
    path = Path(folder) / subfolder
    if not path.is_dir():
        raise UserError(f"{flag}: there is no folder {path}")
    if not (path / "config.json").is_file():  # transformers would silently take a default one
        raise UserError(f"{flag}: {path} has no config.json")
    try:
        model, info = model_class.from_pretrained(folder, subfolder=subfolder, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{flag}: {path} cannot be loaded as {model_class.__name__}: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise UserError(f"{flag}: the weights in {path} do not fit its config: {kind.replace('_', ' ')} {names}")
    return model
