"""preprocess/split_prompts.py: reads every published format, counts each drop under its reason, and trains on nothing held out."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, command

sys.path.insert(0, str(REPOSITORY / "preprocess"))
import split_prompts

from fastvideo.embeddings.prompts import read_prompts
from fastvideo.errors import UserError

SCRIPT = REPOSITORY / "preprocess" / "split_prompts.py"
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
ANIMALS = ("horse", "fox", "heron", "turtle", "rabbit")
PROMPTS = [f"a {colour} {animal} crossing a bridge at dawn" for colour in COLOURS for animal in ANIMALS]
VIDPROM_COLUMNS = ["uuid", "prompt", "time", "toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit"]


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Function that runs the script's main in this process; gives the rows of the two files, and the report."""

    def run(*inputs: Path, pairs: bool = False, **flags: object) -> tuple[list[dict], list[dict], dict]:
        output_dir = tmp_path / "split"
        flags = {"output_dir": output_dir, "heldout": 10, "overwrite": True} | flags
        words = ["--inputs", *map(str, inputs)]
        for name, value in flags.items():
            values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            words += [f"--no-{name}" if value is False else f"--{name}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        split_prompts.main()
        report = json.loads((output_dir / "report.json").read_text())
        assert {path.name for path in output_dir.iterdir()} == {*report["written"], "report.json"}
        assert report["read"] == report["kept"] + sum(entry["count"] for entry in report["dropped"].values())
        identity = ("prompt", "image") if pairs else ("prompt",)
        rows = {Path(name).stem: read_prompts(output_dir / name, identity)[0] for name in report["written"]}
        assert {Path(name).stem: count for name, count in report["written"].items()} == {name: len(part) for name, part in rows.items()}
        return rows["train"], rows.get("heldout", []), report

    return run


@pytest.fixture
def write(tmp_path):
    """Function that writes a list of strings or objects as a file of the format that its name ends in."""

    def write_file(name: str, entries: list) -> Path:
        path = tmp_path / name
        with open(path, "w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, VIDPROM_COLUMNS if "uuid" in entries[0] else list(entries[0]))
                writer.writeheader()
                writer.writerows(entries)
            elif path.suffix == ".json":
                json.dump(entries, file)
            else:
                file.write("".join(f"{entry if path.suffix == '.txt' else json.dumps(entry)}\n" for entry in entries))
        return path

    return write_file


def vidprom(prompt: str, **scores: float) -> dict:
    row = dict.fromkeys(VIDPROM_COLUMNS, 0.001) | {"uuid": "6a83eb92", "prompt": prompt, "time": "Sun Sep  3 12:27:44 2023"}
    return row | scores


def texts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


def counts(report: dict) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in report["dropped"].items() if entry["count"]}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("prompts.txt", lambda prompt: prompt),
        ("prompts.jsonl", lambda prompt: {"prompt": prompt}),
        ("anime.json", lambda prompt: prompt),  # HPDv2's benchmark
        ("train.json", lambda prompt: {"human_preference": [1, 0], "prompt": prompt, "file_path": ["a.jpg", "b.jpg"]}),  # HPDv2
        ("VidProM_unique.csv", vidprom),
        ("video_caption_train.json", lambda prompt: {"path": "v/1.mp4", "cap": prompt, "fps": 29.97, "duration": 5.1}),  # ConsisID
        ("captions.csv", lambda prompt: {"path": "v/1.mp4", "caption": prompt}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format(split, write, name, entry):
    path = write(name, [entry(prompt) for prompt in PROMPTS])
    train, heldout, report = split(path)
    assert sorted(texts(train + heldout)) == sorted(PROMPTS)
    assert len(heldout) == 10
    assert all(row.keys() == {"prompt"} for row in train + heldout)
    assert report["written"] == {"train.txt": 20, "heldout.txt": 10}
    assert report["inputs"] == [{"path": str(path), "prompts": 30}]


def test_what_is_dropped_and_why(split, write):
    bad = {
        "empty": ["", " \t ", "..."],
        "broken": ["a fox with a lone \ufffd in it"],
        "too_short": ["a fox"],
        "too_long": ["fox " * 11, "a fox in the " + "x" * 90],
        "toxic": ["a very rude prompt about foxes"],
        "excluded": ["The benchmark's own prompt about foxes"],
        "duplicate": [
            PROMPTS[3].upper() + ".",
            "  ".join(PROMPTS[4].split()),
            PROMPTS[5].replace("a ", "\uff41 "),
            "a very old lighthouse, at night!",
        ],
        "language": ["una mujer camina por la playa al atardecer", "ein alter Mann sitzt auf einer Bank im Park", "一只红色的狐狸 走过 桥"],
    }
    rows = [vidprom(prompt) for prompt in [*PROMPTS, "A very old lighthouse,  at\nnight"]]
    rows += [vidprom(prompt, threat=0.6 * (reason == "toxic")) for reason, prompts in bad.items() for prompt in prompts]
    benchmark = write("benchmark.json", ["the benchmark's own prompt about foxes."])
    flags = {"max_words": 10, "max_chars": 80, "max_toxicity": 0.5}
    train, heldout, report = split(write("VidProM_unique.csv", rows), exclude=(benchmark,), **flags)
    assert counts(report) == {reason: len(prompts) for reason, prompts in bad.items()}
    assert sorted(texts(train + heldout)) == sorted([*PROMPTS, "A very old lighthouse, at night"])
    for reason, prompts in bad.items():
        examples = report["dropped"][reason]["examples"]
        assert [example.split(": ", 1)[1] for example in examples] == [" ".join(prompt.split())[:100] for prompt in prompts]
    assert report["dropped"]["broken"]["examples"][0].startswith("VidProM_unique.csv, 35: ")
    assert report["arguments"]["max_toxicity"] == 0.5


def test_half_a_character_and_control_characters_are_broken(split, write):
    _, _, report = split(write("captions.json", [{"cap": prompt} for prompt in [*PROMPTS, "a fox with \ud83d half an emoji", None]]))
    assert counts(report) == {"broken": 1, "empty": 1}
    assert counts(split(write("controls.json", [*PROMPTS, "a fox\x00 in a red coat", "a\x1b[1m fox in a coat"]))[2]) == {"broken": 2}
    rows = [{"prompt": prompt, "note": "\ud83d" if i == 0 else ""} for i, prompt in enumerate(PROMPTS)]  # in what is kept beside it too
    path = write("rows.jsonl", [])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert counts(split(path)[2]) == {"broken": 1}


@pytest.mark.parametrize(
    "prompt",
    [
        "cyberpunk city, neon lights, 8k, trending on artstation",
        "portrait of elsa, greg rutkowski, octane render",
        "1girl, solo, blue hair, masterpiece",
        "Angela Merkel in a garden --ar 16:9",
        "mona lisa eating pizza",
        "Goku versus Superman",
        "a café in Paris",
    ],
)
def test_names_and_styles_pass_as_english(prompt):
    assert split_prompts.language_filter("en")(prompt)


def test_other_languages(split, write):
    spanish = [f"un caballo {colour} cruza el puente al amanecer" for colour in ("rojo", "verde", "negro", "blanco")]
    path = write("prompts.txt", [*spanish, *PROMPTS])
    train, heldout, report = split(path, language="es", heldout=2)
    assert sorted(texts(train + heldout)) == sorted(spanish)
    assert counts(report) == {"language": 30}
    train, heldout, _ = split(path, language="any")
    assert len(train + heldout) == 34


def test_order_depends_on_seed_and_prompts_only(split, write, tmp_path):
    path = write("prompts.txt", PROMPTS)
    train, heldout, _ = split(path)
    files = {file.name: file.read_bytes() for file in (tmp_path / "split").iterdir()}
    split(path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "split").iterdir()} == files
    parts = write("one.txt", PROMPTS[:7:-1]), write("two.json", PROMPTS[7::-1])
    assert split(*parts)[:2] == (train, heldout)
    other_train, other_heldout, _ = split(path, seed=1)
    assert set(texts(other_heldout)) != set(texts(heldout))
    assert sorted(texts(other_train + other_heldout)) == sorted(PROMPTS)
    assert texts(train) != [prompt for prompt in PROMPTS if prompt in texts(train)]  # shuffled
    limited, same_heldout, report = split(path, train=5)
    assert (limited, same_heldout, report["left_over_by_train_limit"]) == (train[:5], heldout, 15)
    everything, nothing, _ = split(path, heldout=0)
    assert (texts(everything), nothing) == (texts(heldout + train), [])


def test_jsonl_keeps_fields_and_pairs(split, write, tmp_path):
    """The same prompt with another picture is another row, on the same side; a relative path still leads to the picture."""
    rows = [{"prompt": prompt, "image": f"images/{i}_{k}.png", "source": i} for i, prompt in enumerate(PROMPTS) for k in range(2)]
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / row["image"]).touch()
    rows[1]["image"] = str(tmp_path / rows[1]["image"])  # an absolute path
    train, heldout, report = split(write("prompts.jsonl", [*rows, rows[1] | {"prompt": PROMPTS[0].upper()}]), pairs=True)
    assert counts(report) == {"duplicate": 1}
    assert report["written"] == {"train.jsonl": 40, "heldout.jsonl": 20}
    assert not set(texts(train)) & set(texts(heldout))
    found = {(row["prompt"], row["image"], row["source"]) for row in train + heldout}
    assert found == {(row["prompt"], str(tmp_path / row["image"]), row["source"]) for row in rows}
    assert '"image": "../images/' in (tmp_path / "split" / "train.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("prompts.txt", None, {}, "cannot read {path}: No such file or directory"),
        ("prompts.txt", b"", {}, "{path} holds no prompts"),
        ("prompts.txt", b"a red fox crosses a bridge\n\xff\n", {}, "cannot read {path} as text, after entry"),
        ("prompts.list", b"a fox\n", {}, "{path} ends in none of .txt, .jsonl, .json and .csv: say its --format"),
        ("prompts.txt", b"a red fox crosses a bridge\n", {}, "1 prompts are left, but --heldout is 10: none to train on (dropped: none)"),
        ("prompts.txt", b"a fox\n", {"heldout": 0}, "0 prompts are left, but --heldout is 0: none to train on (dropped: 1 too_short)"),
        ("prompts.jsonl", b'{"prompt": "a"}\n{"prompt"\n', {}, "cannot read {path} as jsonl, after entry 1: "),
        ("prompts.jsonl", b"[1]\n", {}, "entry 1 of {path} must be a string or an object, not [1]"),
        ("prompts.jsonl", b'{"prompt": ["a"]}\n', {}, "entry 1 of {path} has no text as 'prompt', but ['a']"),
        ("prompts.json", b'["a", "b"', {}, "cannot read {path} as json, after entry 0: "),
        ("prompts.json", b'{"anime": ["a"]}', {}, "{path} must be a list of prompts, not dict"),
        ("prompts.csv", b"uuid,text\n1,a fox\n", {}, "{path} has no 'prompt' in its first entry, only 'uuid', 'text': name the"),
        ("prompts.csv", b'prompt\n"a fox', {}, "cannot read {path} as csv, after entry 0: unexpected end of data"),
        ("prompts.csv", b"prompt\na fox\n", {"max_toxicity": 0.5}, "entry 1 of {path} lacks them"),
    ],
)  # fmt: skip
def test_bad_files(split, tmp_path, name, content, flags, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        split(path, **flags)
    assert message.format(path=path) in str(error.value)
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"heldout": -1}, "--heldout must not be negative, but is -1"),
        ({"train": 0}, "--train must be at least 1, not 0"),
        ({"min_words": 9, "max_words": 8}, "--min_words must be from 1 to --max_words, but they are 9 and 8"),
        ({"max_chars": 0}, "--max_chars must be at least 1, not 0"),
        ({"max_toxicity": 1.5}, "--max_toxicity must be from 0 to 1, not 1.5"),
        ({"language": "english"}, "--language must be any or one of ar cs de"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError) as error:
        split_prompts.Args(**{"inputs": (Path("a.txt"),), "output_dir": Path("b")} | flags)
    assert message in str(error.value)


def test_overwrites_only_when_told_and_only_its_own(split, write, tmp_path):
    path, train_file = write("prompts.txt", PROMPTS), tmp_path / "split" / "train.txt"
    split(path)
    before = train_file.read_bytes()
    with pytest.raises(UserError, match=r"split holds heldout.txt: choose another folder, or --overwrite"):
        split(path, seed=1, overwrite=False)
    (tmp_path / "split" / "cache").mkdir()
    with pytest.raises(UserError, match=r"--overwrite replaces the folder .*split, but it also holds cache: choose another folder"):
        split(path, seed=1)
    assert train_file.read_bytes() == before
    (tmp_path / "split" / "cache").rmdir()
    split(path, seed=1)
    assert train_file.read_bytes() != before


def test_command_line(write, tmp_path):
    path = write("prompts.txt", [*PROMPTS, "a fox"])
    words = command(SCRIPT, "--inputs", path.name, "--output_dir", "split", "--heldout", 10)
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "31 prompts read, 30 kept\n  1 too short, such as 'prompts.txt, 31: a fox'\nsplit/train.txt: 20 prompts\n" in result.stdout
