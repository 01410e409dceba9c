"""Tokenizers that give a model the token ids it was trained on: those of the files in its folder, whatever class its settings name.

transformers builds the tokenizers of some classes anew and takes only the vocabulary from tokenizer.json: `LlamaTokenizerFast` then splits
text as Llama 3 never saw it and loses all that is not ASCII, and `T5Tokenizer` takes another token for UMT5's unknown one.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex
import sentencepiece
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastvideo.errors import UserError, first_line, warn

PROBE = (  # what tokenizers differ in: spaces, lines, marks, digits, scripts, joined emoji, special tokens
    *("A cat walks on the grass, realistic style.", "  two  spaces,\ta tab\n\nand\r\nlines \n", "1 12 123 1234567 3D 4k"),
    *("DON'T stop: (it's) \"5-10%\" [of] #1_000 @ $3.50?!...", "Ein Mädchen läuft über die Straße; déjà vu, naïve café"),
    *("Девочка бежит по траве.", "Ένα κορίτσι τρέχει στο γρασίδι", "فتاة تركض على العشب", "ילדה רצה על הדשא", "एक लड़की घास पर दौड़ रही है"),
    *("一个女孩在草地上奔跑。", "少女が草原を走っている。カメラ", "소녀가 잔디 위를 달린다", "เด็กหญิงวิ่งบนหญ้า", "🐱 👩‍🚀🏽 ❤️ 🇯🇵"),
    "<|start_header_id|>user<|end_header_id|>\n\nred<|eot_id|>",
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as OpenAI published it


def load_tokenizers(model_dir: str | Path, flag: str, *, of_any_kind: bool = False) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers that the model_index.json of a pipeline's folder names, by name, each as `load_tokenizer` gives it.

    With `of_any_kind` those of other libraries than transformers are left to diffusers.
    """
    index = json.loads((Path(model_dir) / "model_index.json").read_bytes())
    named = {name: entry for name, entry in index.items() if name.startswith("tokenizer") and isinstance(entry, list)}
    return {
        name: load_tokenizer(Path(model_dir) / name, getattr(transformers, kind, AutoTokenizer), flag, of_any_kind=of_any_kind)
        for name, (library, kind) in named.items()
        if library == "transformers" or not of_any_kind
    }


def load_tokenizer(folder: Path, tokenizer_class: Any, flag: str, *, of_any_kind: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. `tokenizer_class` reads only folders without tokenizer.json.

    It pads on the right, as all models do that are trained here; with `of_any_kind` as its settings say. Raises UserError, beginning with
    the flag, for files that are missing or broken, for token ids that are not those of the files, and for files that nothing but
    `tokenizer_class` can read; with `of_any_kind` these are only warned of.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{flag}: {folder} is {'empty' if folder.is_dir() else 'missing'}: download the folder again")
    in_one_file = folder / "tokenizer.json"
    options = {"local_files_only": True, "model_input_names": ["input_ids", "attention_mask"]}
    options |= {} if of_any_kind else {"padding_side": "right"}
    try:
        tokenizer = (PreTrainedTokenizerFast if in_one_file.is_file() else tokenizer_class).from_pretrained(folder, **options)
        files = [folder / name for kind, name in tokenizer.vocab_files_names.items() if kind != "tokenizer_file"]
        if not in_one_file.is_file() and not all(path.is_file() for path in files):  # transformers would make one that knows no words
            others = " and ".join(path.name for path in files)
            raise UserError(
                f"{flag}: {folder} has no {in_one_file.name}" + f" and no {others}" * bool(files) + ": download the folder again"
            )
        tokenizer("a", padding="max_length", max_length=min(8, tokenizer.model_max_length), truncation=True, return_tensors="pt")
        ids, own = token_ids(tokenizer), own_token_ids(folder)
    except UserError:
        raise
    except Exception as error:  # what transformers and tokenizers raise is not documented
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        what = "is no tokenizer that works" if in_one_file.is_file() else f"has no {in_one_file.name}, and what it has makes no tokenizer"
        raise UserError(f"{flag}: {folder} {what} ({found}): {first_line(error)}: download the folder again") from error
    if own is None:
        unchecked = f"{folder} has no tokenizer.json, without which its tokens cannot be checked"
        if not of_any_kind:
            raise UserError(f"{flag}: {unchecked}")
        warn(unchecked)
    for text, found, right in zip(PROBE, ids, own or ids, strict=True):
        if found != right:
            place = next((i for i, pair in enumerate(zip(found, right)) if pair[0] != pair[1]), min(len(found), len(right)))
            raise UserError(
                f"{flag}: {folder} is read wrongly: for {text!r} its own files give the tokens {_around(right, place)}, but this has "
                f"{_around(found, place)}: its {' and '.join(_settings_of(folder))} may be of another model: download the folder again"
            )
    return tokenizer


def _around(ids: list[int], place: int) -> str:
    """The ids at the first difference, and where that is."""
    return f"{ids[max(place - 2, 0) : place + 3]} around place {place}"


def _settings_of(folder: Path) -> list[str]:
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if (folder / name).is_file()] or ["files"]


def check_tokenizer(folder: Path, encoder: Path, flag: str) -> None:
    """UserError unless the tokenizer in `folder` works, and its vocabulary is that of the text encoder whose folder is `encoder`.

    An encoder's may be somewhat larger, filled up to a multiple of 64 or 128.
    """
    known = max(load_tokenizer(folder, AutoTokenizer, flag).get_vocab().values()) + 1
    size = json.loads((encoder / "config.json").read_bytes())["vocab_size"]
    if not 0.9 * size <= known <= size:
        raise UserError(
            f"{flag}: {folder} knows {known} tokens, but {encoder} has {size}: it is another encoder's tokenizer: download the folder again"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of the probe's texts, with what the tokenizer puts around them."""
    return [tokenizer(text).input_ids for text in PROBE]  # one by one: a batch would start threads, and forking warns of them


def own_token_ids(folder: Path) -> list[list[int]] | None:
    """What the files in `folder` give for the probe without any of transformers' classes; None if that takes one of them.

    tokenizer.json is read by tokenizers, T5's spiece.model by sentencepiece, CLIP's vocab.json and merges.txt by CLIP's published rules.
    """
    if (folder / "tokenizer.json").is_file():
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        own.no_padding()  # the file may hold what the last call before its saving asked for
        own.no_truncation()
        return [own.encode(text).ids for text in PROBE]
    if (folder / "spiece.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        return [[*pieces.encode(text), pieces.eos_id()] for text in PROBE]
    files = [folder / "vocab.json", folder / "merges.txt"]
    vocab = json.loads(files[0].read_bytes()) if all(path.is_file() for path in files) else {}
    start, end = (vocab.get(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    if start is None or end is None:
        return None
    own = Tokenizer(models.BPE.from_file(*map(str, files), end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower() for text in PROBE]
    return [[start, *own.encode(regex.findall(CLIP_WORDS, text), is_pretokenized=True).ids, end] for text in texts]


def token_digest(components: dict[str, Any]) -> str:
    """Of the ids that the tokenizers among a pipeline's components give for the probe: for the fingerprint of what they read."""
    return _digest({name: token_ids(part) for name, part in components.items() if isinstance(part, PreTrainedTokenizerBase)})


def own_digest(model_dir: str | Path, names: Iterable[str]) -> str:
    """What `token_digest` is if the tokenizers in these folders of `model_dir` are read rightly. UserError for what cannot be read."""
    try:
        ids = {name: own_token_ids(Path(model_dir) / name) for name in names}
    except Exception as error:  # as above
        raise UserError(f"the tokenizers in {model_dir} do not work: {first_line(error)}") from error
    for name in [name for name, own in ids.items() if own is None]:
        raise UserError(
            f"{Path(model_dir) / name} is missing or empty, or has no tokenizer.json, without which its tokens cannot be checked"
        )
    return _digest(ids)


def _digest(ids: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([PROBE, ids], sort_keys=True).encode()).hexdigest()
