"""Does text reach the encoders as they were trained on it? Token ids against the folders' own files, and tokens found by hand."""

import gzip
import importlib.util
import json
import shutil
import sys
import unicodedata
from pathlib import Path

import diffusers
import pytest
import sentencepiece
import torch
import torch.distributed as dist
import transformers
from conftest import SMALL_RUN, run_script, tiny_model
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from fastvideo.embeddings.cache import EmbeddingCache, write_cache
from fastvideo.embeddings.encoders import in_template, load_encoders
from fastvideo.embeddings.fingerprint import check_encoder, encoder_fingerprint
from fastvideo.errors import UserError
from fastvideo.models import tokenizers
from fastvideo.models.families import FAMILIES
from fastvideo.models.pretrained import load_pipeline
from fastvideo.models.tokenizers import load_tokenizer, load_tokenizers, own_digest, own_token_ids, token_digest, token_ids
from fastvideo.parallel.distributed import exit_code_of, init
from fastvideo.rewards.clip import load_clip_folder

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "shapes" / "models"
SENTENCES = (REPOSITORY / "tests" / "sentences.txt").read_text().splitlines()
FOLDERS = sorted(path.parent for path in MODELS.glob("**/tokenizer.json"))
CPU = torch.device("cpu")

# Three sentences in the pieces that Llama 3 splits text into, found by hand.
PIECES = [
    ["A", " cat", " walks", " on", " the", " grass", ",", " realistic", " style", "."],
    ["Two", " ", " cats", " don", "'t", "\n", "run", " ", "123", "456", "7", " km", ":", " 一只猫", " 🐱!"],
    ["Девочка", " бежит", ";", " ünïcode", "\r\n\r\n", "(ok", ")"],
]
SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>", 257: "<pad>"}
LLAMA_3 = [SPECIAL.get(i, f"<|reserved_special_token_{i}|>") for i in range(258)]  # 128000 to 128257
LLAMA_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself if it prints, else the next one from 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory) -> Path:
    """A HunyuanVideo folder whose LLaMA has a tokenizer in the layout of the published one, and embeddings that are an id's bits."""
    folder = tmp_path_factory.mktemp("llama_3") / "hunyuan"
    shutil.copytree(MODELS / "hunyuan", folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    learner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False)
    learner.train_from_iterator(["".join(pieces) for pieces in PIECES] + [DEFAULT_PROMPT_TEMPLATE["template"]] * 2, trainer)
    settings = json.loads(learner.to_str())
    vocab = settings["model"]["vocab"]
    vocab |= {f"unused word {i}": i for i in range(len(vocab), 128000)}
    settings["model"] |= {"vocab": vocab, "ignore_merges": True}
    own = Tokenizer.from_str(json.dumps(settings))
    own.add_special_tokens(LLAMA_3)
    begin = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)])
    own.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    own.save(str(folder / "tokenizer" / "tokenizer.json"))
    words = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"}
    words |= {"tokenizer_class": "LlamaTokenizer", "model_max_length": 256, "padding_side": "left", "add_prefix_space": True}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(words))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "LlamaTokenizerFast"]}))

    # HunyuanVideo takes the states two layers before the last: of a LLaMA with two layers these are the embeddings.
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=128258, **sizes))
    bits = torch.arange(128258)[:, None] >> torch.arange(32) & 1
    encoder.embed_tokens.weight.data = bits.float()
    encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def embed(family: str, *flags: object) -> int:
    """Run preprocess/embed_<family>.py in this process; gives its exit code."""
    script = REPOSITORY / "preprocess" / f"embed_{family}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    sys.argv = [str(script), *map(str, flags)]
    return exit_code_of(module.main)


def own_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Of the folder's tokenizer.json, by the tokenizers package alone."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    own.no_truncation()
    return [own.encode(text).ids for text in texts]


def metaspace(monkeypatch) -> None:
    """transformers' own way with such a folder, as the class in its model_index.json has it."""
    monkeypatch.setattr(tokenizers, "PreTrainedTokenizerFast", transformers.LlamaTokenizerFast)


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


# The ids themselves


@pytest.mark.parametrize("family", ["hunyuan", "skyreels"])
def test_llama_reads_the_tokens_that_were_found_by_hand(llama_3, family, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    rows = [{"prompt": "".join(pieces), "image": "first.png"} for pieces in PIECES]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = llama_3
    if family == "skyreels":
        model = tmp_path / "skyreels"
        shutil.copytree(llama_3, model)
        shutil.copytree(MODELS / "skyreels" / "vae", model / "vae")
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "HunyuanSkyreelsImageToVideoPipeline"}))
    size = ("--height", 32, "--width", 32) if family == "skyreels" else ()
    assert not embed(family, "--model", model, "--prompts", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "cache", *size)

    vocab = json.loads((llama_3 / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    letters = byte_letters()
    cache = EmbeddingCache(tmp_path / "cache")
    for i, pieces in enumerate(PIECES):
        row = {key: value[0] for key, value in cache.get([i]).items()}
        right = [vocab["".join(letters[byte] for byte in piece.encode())] for piece in pieces] + [128009]  # <|eot_id|> of the template
        kept = row["prompt_attention_mask"].bool()
        assert kept.sum() == len(right) and kept[: len(right)].all()  # from the first token of the prompt on, and padded on the right
        found = (row["prompt_embeds"].long() << torch.arange(32)).sum(-1)
        assert found[kept].tolist() == right
        assert (found[~kept] == 128257).all()
    init()
    check_encoder(cache, model)


@pytest.mark.parametrize("family", [*FAMILIES, "llama_3"])
def test_ids_are_those_of_the_folders_own_tokenizer_json(family, llama_3):
    folder = llama_3 if family == "llama_3" else tiny_model(family)
    index = json.loads((folder / "model_index.json").read_text())
    named = [name for name in index if name.startswith("tokenizer")]
    none = absent(*(name for name, entry in index.items() if isinstance(entry, list) and name not in named and name != "scheduler"))
    encoders = load_encoders(getattr(diffusers, index["_class_name"]), str(folder), **none)
    assert len(named) == len(FAMILIES["hunyuan" if family == "llama_3" else family].text_encoders)
    for name in named:
        tokenizer = getattr(encoders, name)
        assert tokenizer(SENTENCES).input_ids == own_ids(folder / name, SENTENCES)
        padded = tokenizer(SENTENCES[:3], padding="max_length", max_length=60, return_tensors="pt")
        assert set(padded) == {"input_ids", "attention_mask"}
        assert padded.attention_mask.diff().max() == 0  # on the right


def test_evaluation_and_rewards_read_the_same(tmp_path):
    assert load_pipeline(MODELS / "hunyuan", "float32", CPU).tokenizer(SENTENCES).input_ids == own_ids(
        MODELS / "hunyuan" / "tokenizer", SENTENCES
    )
    tokenize = load_clip_folder("clip", str(MODELS / "clip"))[1]
    right = [[*ids[:15], ids[-1]] if len(ids) > 16 else ids for ids in own_ids(MODELS / "clip", SENTENCES)]
    found = tokenize(SENTENCES)
    assert [row[mask.bool()].tolist() for row, mask in zip(found["input_ids"], found["attention_mask"])] == right


def test_a_pipeline_of_ones_own_reads_the_same_with_the_tokenizer_that_the_docs_give_it(llama_3):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(llama_3 / "tokenizer", padding_side="right")
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(llama_3, tokenizer=tokenizer, transformer=None, vae=None)
    assert pipeline.tokenizer(SENTENCES).input_ids == own_ids(llama_3 / "tokenizer", SENTENCES)
    assert pipeline.tokenizer.padding_side == "right"


def test_the_sentences_and_the_probe_are_of_many_scripts():
    assert len(SENTENCES) >= 50
    assert len(tokenizers.PROBE) == 16  # as docs/prompts.md says
    for texts in (SENTENCES, tokenizers.PROBE):
        letters = {unicodedata.name(letter).split()[0].split("-")[0] for text in texts for letter in text if letter.isalpha()}
        assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "CJK", "HIRAGANA", "HANGUL", "THAI", "DEVANAGARI"} <= letters
        assert any(ord(letter) > 0x1F000 for text in texts for letter in text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(MODELS)))
def test_embedded_tokenizers_are_used_as_their_files_have_them(folder):
    """By diffusers alone, too, which takes the class that model_index.json names."""
    index = folder.parent / "model_index.json"
    name = json.loads(index.read_text())[folder.name][1] if index.exists() else "AutoTokenizer"
    tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    assert token_ids(tokenizer) == own_ids(folder, list(tokenizers.PROBE))


# What is read wrongly is refused


def test_metaspace_over_a_byte_level_tokenizer_is_refused(llama_3, tmp_path, monkeypatch, capsys):
    wrong = transformers.LlamaTokenizerFast.from_pretrained(llama_3 / "tokenizer")
    assert wrong(SENTENCES).input_ids != own_ids(llama_3 / "tokenizer", SENTENCES)  # or this test shows nothing
    metaspace(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert embed("hunyuan", "--model", llama_3, "--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "cache") == 2
    assert not (tmp_path / "cache").exists()
    sentence = capsys.readouterr().err.splitlines()[-1]
    wrongly = f"{llama_3 / 'tokenizer'} is read wrongly: for 'A cat walks on the grass, realistic style.' its own files give the tokens"
    assert sentence.startswith(f"error: --model: {wrongly} [128000, ")
    with pytest.raises(UserError, match=r"tokenizer is read wrongly: for 'A cat walks"):
        load_pipeline(llama_3, "float32", CPU)


def test_a_tokenizer_of_another_library_is_not_left_unchecked(tmp_path):
    shutil.copytree(MODELS / "sd" / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text(json.dumps({"tokenizer": ["own_module", "OwnTokenizer"]}))
    assert list(load_tokenizers(tmp_path, "--model")) == ["tokenizer"]
    assert not load_tokenizers(tmp_path, "--model", of_any_kind=True)


def test_a_cache_of_wrong_tokens_is_refused(llama_3, tmp_path):
    """One of an earlier version, which knew of no ids, and one that was made through Metaspace."""
    ranks = init()
    names = ("tokenizer", "tokenizer_2")
    right = load_tokenizers(llama_3, "--model")
    wrong = right | {"tokenizer": transformers.LlamaTokenizerFast.from_pretrained(llama_3 / "tokenizer")}
    assert token_digest(right) == own_digest(llama_3, names) != token_digest(wrong)
    for name, ids in (("earlier", {}), ("wrong", {"token_ids": token_digest(wrong)}), ("right", {"token_ids": token_digest(right)})):
        fingerprint = encoder_fingerprint(llama_3, ("text_encoder", *names), **ids)
        write_cache(tmp_path / name, [{"prompt": "a cat"}], lambda rows: {"x": torch.zeros(len(rows), 1)}, fingerprint, ranks, 4, 4)
    check_encoder(EmbeddingCache(tmp_path / "right"), llama_3)
    with pytest.raises(UserError, match=r"earlier was made with token_ids None, but .* so make it again in an empty --output_dir"):
        check_encoder(EmbeddingCache(tmp_path / "earlier"), llama_3)
    with pytest.raises(UserError, match=r"wrong was made with token_ids '\w+', but .* so make it again in an empty --output_dir"):
        check_encoder(EmbeddingCache(tmp_path / "wrong"), llama_3)


def test_training_refuses_a_cache_of_an_earlier_version(tmp_path):
    model = MODELS / "hunyuan"
    fingerprint = encoder_fingerprint(model, ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), family="hunyuan")
    write_cache(tmp_path / "cache", [{"prompt": "a cat"}], lambda rows: {"x": torch.zeros(len(rows), 1)}, fingerprint, init(), 4, 4)
    flags = {"--model": model, "--embeddings": tmp_path / "cache", "--output_dir": tmp_path / "run"} | SMALL_RUN | {"--num_frames": 9}
    result = run_script(REPOSITORY / "train_grpo_hunyuan.py", flags, log=tmp_path / "log")
    assert result.returncode == 2
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(f"error: {tmp_path / 'cache'} was made with token_ids None, but {model} has '")
    assert sentence.endswith("so make it again in an empty --output_dir")


def test_a_template_that_is_cut_at_another_token_is_refused():
    tokenizer = load_tokenizer(MODELS / "hunyuan" / "tokenizer", None, "--model")
    assert [len(ids) for ids in in_template(tokenizer, DEFAULT_PROMPT_TEMPLATE)(["a red circle", ""])] == [4, 1]  # with <|eot_id|>
    with pytest.raises(UserError, match=r"clip makes 414 tokens of what comes before the prompt in .*, of which it cuts 95"):
        in_template(load_tokenizer(MODELS / "clip", None, "--model"), DEFAULT_PROMPT_TEMPLATE)


def test_umt5_keeps_its_own_unknown_token(tmp_path, monkeypatch):
    """UMT5's is <unk>, the fourth; T5's class says the third, <s>."""
    shutil.copytree(MODELS / "wan" / "tokenizer", tmp_path / "umt5")
    path = tmp_path / "umt5" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"].insert(2, ["<s>", 0.0])
    settings["model"]["unk_id"] = 3
    settings["added_tokens"].insert(2, settings["added_tokens"][2] | {"content": "<s>"})
    settings["added_tokens"][3]["id"] = 3
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "umt5", transformers.T5Tokenizer, "--model")
    assert tokenizer.convert_ids_to_tokens(tokenizer("猫").input_ids) == ["▁", "<unk>", "</s>"]
    monkeypatch.setattr(tokenizers, "PreTrainedTokenizerFast", transformers.T5Tokenizer)
    with pytest.raises(UserError, match="umt5 is read wrongly: for 'Ein Mädchen"):
        load_tokenizer(tmp_path / "umt5", transformers.T5Tokenizer, "--model")


# Folders without tokenizer.json


@pytest.fixture
def clip_files(tmp_path) -> Path:
    """vocab.json and merges.txt as OpenAI's CLIP has them, and Stable Diffusion v1.4 and FLUX.1 with it."""
    folder = tmp_path / "clip"
    folder.mkdir()
    merges = gzip.decompress((REPOSITORY / "fastvideo" / "rewards" / "clip_merges.txt.gz").read_bytes()).decode().strip().split("\n")
    letters = sorted(byte_letters())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}))
    return folder


def test_clip_of_vocabulary_and_merges(clip_files):
    tokenizer = load_tokenizer(clip_files, transformers.CLIPTokenizer, "--model")
    assert len(tokenizer) == 49408
    assert tokenizer("A photo of a  cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # as CLIP was published
    assert own_token_ids(clip_files) == token_ids(tokenizer)


def test_clip_that_is_read_otherwise_is_refused(clip_files):
    class Cased(transformers.CLIPTokenizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._tokenizer.normalizer = None

    with pytest.raises(UserError, match="clip is read wrongly: for 'A cat walks"):
        load_tokenizer(clip_files, Cased, "--model")


@pytest.fixture
def spiece(tmp_path):
    """Function from the places of <pad>, </s> and <unk> to a folder with a spiece.model."""

    def make(pad: int, eos: int, unk: int) -> Path:
        folder = tmp_path / "t5"
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES[:30] * 5),
            model_prefix=str(folder / "spiece"),
            vocab_size=300,
            **{"pad_id": pad, "eos_id": eos, "unk_id": unk, "bos_id": -1 if unk == 2 else 2, "pad_piece": "<pad>"},
            hard_vocab_limit=False,
            minloglevel=2,
        )
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "T5Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 512}))
        return folder

    return make


def test_t5_of_a_sentencepiece_model(spiece):
    folder = spiece(0, 1, 2)
    tokenizer = load_tokenizer(folder, transformers.T5Tokenizer, "--model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert tokenizer(SENTENCES[:30]).input_ids == [[*pieces.encode(text), 1] for text in SENTENCES[:30]]


def test_t5_with_another_unknown_token_is_refused(spiece):
    with pytest.raises(UserError, match="t5 is read wrongly"):
        load_tokenizer(spiece(0, 1, 3), transformers.T5Tokenizer, "--model")


def test_what_nothing_else_can_read_makes_no_cache_but_pictures(clip_files, capsys):
    """A vocabulary of another kind: a cache or an evaluation needs the check; a picture model of any kind is only warned of."""
    vocab = json.loads((clip_files / "vocab.json").read_text())
    (clip_files / "vocab.json").write_text(json.dumps({token.replace("startoftext", "im_start"): i for token, i in vocab.items()}))
    with pytest.raises(UserError, match=r"clip has no tokenizer\.json, without which its tokens cannot be checked"):
        load_tokenizer(clip_files, transformers.Qwen2Tokenizer, "--model")
    with pytest.raises(UserError, match=r"clip is missing or empty, or has no tokenizer\.json"):
        own_digest(clip_files.parent, ["clip"])
    (clip_files / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>", "padding_side": "left"}))
    tokenizer = load_tokenizer(clip_files, transformers.Qwen2Tokenizer, "--model", of_any_kind=True)
    assert tokenizer.padding_side == "left"
    assert "clip has no tokenizer.json, without which its tokens cannot be checked" in capsys.readouterr().err
    tokenizer.save_pretrained(clip_files)
    assert token_ids(load_tokenizer(clip_files, transformers.Qwen2Tokenizer, "--model")) == token_ids(tokenizer)
