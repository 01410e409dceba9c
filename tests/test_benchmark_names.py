"""Benchmarks by their names: what they sample, what scores it, and what is refused. tests/test_geneval.py has GenEval's."""

import json

import pytest
import torch
from conftest import REPOSITORY

from fastvideo.errors import UserError
from fastvideo.evaluation.benchmarks import BENCHMARKS, parse_benchmark
from fastvideo.rewards import load_rewards, parse_rewards

PROMPTS = REPOSITORY / "shapes" / "prompts"
TRAIN, VIDEO = PROMPTS / "train.txt", PROMPTS / "video_train.txt"
CLIP = REPOSITORY / "shapes" / "models" / "clip"
STYLES = ("anime", "concept-art", "paintings", "photo")


@pytest.fixture
def styles(tmp_path):
    """HPS-v2's folder, in which each list has a prompt twice, and all share one."""
    for style in STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"one {style}", "the same", f"one {style}", "more"]))
    (tmp_path / "drawbench.json").write_text("[]")  # it lies beside them
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rewards", "images", "rows"),
    [
        (f"clip={TRAIN},model={CLIP}", (f"clip={CLIP}",), 1, 32),
        (f"clip={TRAIN},dtype=bfloat16,model={CLIP},images=3", (f"clip={CLIP},dtype=bfloat16",), 3, 32),
        (f"pickscore={TRAIN},model=P,processor=Q", ("pickscore=P,processor=Q",), 1, 32),
        (f"ocr={TRAIN}", ("ocr",), 1, 32),
        (f"ocr={TRAIN},threads=2", ("ocr,threads=2",), 1, 32),
        (f"videoalign={VIDEO},model=V", tuple(f"videoalign.{head}=V,norm=0" for head in ("vq", "mq", "ta")), 1, 48),
        (f"videoalign={VIDEO},model=V,norm=1,fps=4", tuple(f"videoalign.{head}=V,norm=1,fps=4" for head in ("vq", "mq", "ta")), 1, 48),
        (f"visionreward={VIDEO},server=http://a:1+http://b:2", ("http.visionreward=http://a:1+http://b:2",), 1, 48),
        (f"visionreward={VIDEO},server=http://a:1,send=uint8", ("http.visionreward=http://a:1,send=uint8",), 1, 48),
        (f"geneval={PROMPTS}/geneval.jsonl,detector=my.py:load,clip=C", ("geneval=my.py:load,clip=C",), 4, 72),
        (f"geneval={PROMPTS}/geneval.jsonl,images=1,detector=shapes", ("geneval=shapes",), 1, 72),
    ],
)
def test_what_a_name_stands_for(text, rewards, images, rows):
    benchmark = parse_benchmark(text)
    assert (benchmark.name, benchmark.rewards, benchmark.images_per_prompt) == (text.partition("=")[0], rewards, images)
    assert len(benchmark.rows) == rows
    grouped = benchmark.name == "geneval"
    assert (benchmark.group, benchmark.total) == (("tag", "groups") if grouped else (None, "samples"))


def test_the_four_styles(styles):
    benchmark = parse_benchmark(f"hpsv2={styles},weights=models/HPS_v2.1_compressed.pt,dtype=bfloat16")
    assert benchmark.rewards == ("hpsv2=models/HPS_v2.1_compressed.pt,dtype=bfloat16",)
    assert (benchmark.group, benchmark.total, benchmark.images_per_prompt) == ("style", "groups", 1)
    expected = [(prompt, style) for style in STYLES for prompt in (f"one {style}", "the same", f"one {style}", "more")]
    assert [
        (row["prompt"], row["style"]) for row in benchmark.rows
    ] == expected  # published means count a prompt as often as it stands there


def test_rows_of_one_prompt_with_several_images():
    rows = parse_benchmark(f"videoalign={PROMPTS}/i2v_train.jsonl,model=V").rows
    assert len(rows) == 96 and len({row["prompt"] for row in rows}) == 48


def test_its_rewards_can_be_loaded():
    benchmark = parse_benchmark(f"clip={TRAIN},model={CLIP}")
    (reward,) = load_rewards(parse_rewards(benchmark.rewards), torch.device("cpu"), benchmark.rows).values()
    assert reward(torch.zeros(2, 3, 32, 32), benchmark.rows[:2]).shape == (2,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beauty=p.txt", f"names are {', '.join(BENCHMARKS)}"),
        ("clip", r"is not of the form NAME=PATH\[,OPTION=VALUE...\]"),
        ("clip=", "is not of the form"),
        (f"clip.large={TRAIN},model=F", "is not of the form"),
        (f"clip={TRAIN},model=F@0.3", "is not of the form"),
        (f"clip={TRAIN}", r"it needs the option model=FOLDER"),
        (f"clip={TRAIN},model=", r"it needs the option model=FOLDER"),
        (f"visionreward={VIDEO}", "it needs the option server=http://HOST:PORT"),
        (f"clip={TRAIN},model=F,model=G", "gives the option 'model' twice"),
        (f"clip={TRAIN},model=F,size=3", "unknown option 'size'; clip knows model, images, dtype$"),
        (f"clip={TRAIN},modl=F", "unknown option 'modl'; clip knows model, images, dtype$"),
        (f"visionreward={VIDEO},sever=http://a:1", "unknown option 'sever'; visionreward knows server, images, reward, "),
        (f"ocr={TRAIN},threads=x", "the option 'threads' in 'ocr,threads=x' is not a number"),
        (f"clip={TRAIN},model=F,images=0", "images=0 is not a whole number above 0"),
        (f"clip={TRAIN},model=F,images=two", "images=two is not a whole number above 0"),
        ("clip=nowhere.txt,model=F", "cannot read prompt file nowhere.txt"),
        ("hpsv2=nowhere,weights=F", "anime.json can't be read: .*; hpsv2 needs a folder with anime, concept-art, paintings, photo.json"),
        (f"geneval={PROMPTS}/i2v_train.jsonl,detector=shapes", 'must be an object with a string as "tag"'),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_benchmark(text)
    assert str(error.value).startswith(f"benchmark {text!r}") and "--rewards" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", '["a", 3]', '["a", " "]', "[", "\ufeff"])
def test_styles_that_are_no_list_of_prompts(styles, content):
    (styles / "photo.json").write_text(content)
    with pytest.raises(UserError, match=r"photo\.json (is not a list of prompts|can't be read)"):
        parse_benchmark(f"hpsv2={styles},weights=F")
