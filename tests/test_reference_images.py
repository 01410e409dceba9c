"""preprocess/make_reference_images.py: each picture depends on its row and the seed only, whatever the batches, processes and kills."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, PROMPTS, REPOSITORY, launch, run_script, start_forked
from diffusers import FluxPipeline
from PIL import Image

from fastvideo.parallel.distributed import keyed_generator

SCRIPT = REPOSITORY / "preprocess" / "make_reference_images.py"
LINES = PROMPTS.read_text().splitlines()
ROWS = [{"prompt": prompt} for prompt in LINES[:5]] + [{"prompt": "it turns red", "image_prompt": LINES[5], "source": 7}]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def flags(prompt_file):
    """Function from an output folder to the flags of a run of a second."""
    common = {"--model": MODEL, "--prompts": prompt_file, "--height": 32, "--width": 32, "--num_inference_steps": 3}
    return lambda output_dir: common | {"--images_per_prompt": 2, "--seed": 3, "--output_dir": output_dir}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """The folder of one finished run, by the command of a user. Not to be changed."""
    folder = tmp_path_factory.mktemp("reference") / "images of prompts"
    result = launch(SCRIPT, flags(folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"12 images of 6 prompts: {folder / 'prompts.jsonl'}\n"
    return folder


@pytest.fixture
def error_of(flags, tmp_path):
    """Function that runs the script with changed flags, which must end it with exit code 2; gives the sentence."""

    def run(*changes: dict, output_dir: Path = tmp_path / "out", processes: int = 1) -> str:
        result = run_script(SCRIPT, flags(output_dir), *changes, processes=processes, log=tmp_path / "log")
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1
        return sentences[0]

    return run


def pixels(folder: Path) -> np.ndarray:
    """(pictures, height, width, 3), in order of their names."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]).astype(int)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").iterdir())


def test_rows_and_pictures(finished):
    """The pictures are those of the pipeline, of "image_prompt" where there is one; other fields stay."""
    rows = [json.loads(line) for line in (finished / "prompts.jsonl").read_text().splitlines()]
    assert rows == [row | {"image": f"images/{i:06d}_{k}.png"} for i, row in enumerate(ROWS) for k in range(2)]
    assert {path.name for path in finished.iterdir()} == {"images", "prompts.jsonl", "settings.json"}
    assert names(finished) == [f"{i:06d}_{k}.png" for i in range(6) for k in range(2)]
    pipeline = FluxPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    generators = [keyed_generator(3, "reference_image", i, k) for i, k in ((5, 1), (0, 0))]
    images = pipeline(
        prompt=[LINES[5], LINES[0]], height=32, width=32, num_inference_steps=3, guidance_scale=3.5, generator=generators
    ).images
    for name, image in zip(("000005_1.png", "000000_0.png"), images):
        written = Image.open(finished / "images" / name)
        assert (written.mode, written.size) == ("RGB", (32, 32))
        assert np.abs(np.asarray(written).astype(int) - np.asarray(image)).max() <= 1
    assert len({image.tobytes() for image in pixels(finished)}) == 12


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 7), (2, 2)])
def test_layout_changes_nothing(flags, finished, tmp_path, processes, batch_size):
    """Up to rounding; PNG has 256 levels."""
    result = run_script(SCRIPT, flags(tmp_path / "out"), {"--batch_size": batch_size}, processes=processes, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("12 images of 6 prompts") == 1
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (finished / "prompts.jsonl").read_bytes()
    assert (tmp_path / "out" / "settings.json").read_bytes() == (finished / "settings.json").read_bytes()
    assert np.abs(pixels(tmp_path / "out") - pixels(finished)).max() <= 1


def test_killed_run_goes_on(flags, tmp_path):
    slow = {"--num_inference_steps": 6, "--batch_size": 1}
    result = run_script(SCRIPT, flags(tmp_path / "whole"), slow, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    out, images = tmp_path / "out", tmp_path / "out" / "images"
    (process,) = start_forked(SCRIPT, flags(out), slow, log=tmp_path / "log")
    while len(list(images.glob("*_*.png"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (out / "prompts.jsonl").exists()
    finished = {path: path.stat().st_mtime_ns for path in images.glob("[0-9]*.png")}
    assert 3 <= len(finished) < 12

    kept, flipped, cut = sorted(finished)[:3]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-20])
    (images / ".000009_0.png.tmp").write_bytes(b"half a picture")
    result = run_script(SCRIPT, flags(out), slow, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    assert [f"{path} is damaged" in result.stderr for path in (kept, flipped, cut)] == [False, True, True]
    assert [path for path in finished if path.stat().st_mtime_ns == finished[path]] == [
        path for path in finished if path not in (flipped, cut)
    ]
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert names(out) == names(tmp_path / "whole")


def test_other_settings_are_refused(error_of, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert "was made with seed 3, but this run has 4" in error_of({"--seed": 4}, output_dir=folder)
    assert "was made with height 32, but this run has 40" in error_of({"--height": 40}, output_dir=folder, processes=2)
    other = tmp_path / "other.txt"
    other.write_text("a red circle\n")
    assert "was made with prompts 'sha256:" in error_of({"--prompts": other}, output_dir=folder)
    model = shutil.copytree(MODEL, tmp_path / "model")
    with open(model / "transformer" / "config.json", "a") as file:
        file.write("\n")
    assert "was made with transformer 'sha256:" in error_of({"--model": model}, output_dir=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    (folder / "settings.json").unlink()
    assert "images is not empty, but there is no" in error_of(output_dir=folder)


def test_flags_may_be_mended_before_the_first_picture(error_of, flags, tmp_path):
    message = "--width 33 --height 32: FluxPipeline makes 32 x 32 pixels instead"
    assert message in error_of({"--width": 33})
    result = run_script(SCRIPT, flags(tmp_path / "out"), {"--images_per_prompt": 1}, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"--guidance_scale": "nan"}, "--guidance_scale must be 0 or more, not nan"),
        ({"--model": REPOSITORY / "shapes"}, "is no diffusers folder: it has no model_index.json"),
        ({"--prompts": "nowhere.txt"}, "cannot read prompt file nowhere.txt"),
        ({"--output_dir": "/dev/null/out"}, "cannot write to /dev/null/out: Not a directory"),
    ],
    ids=lambda value: "",
)
def test_mistakes(error_of, changes, message):
    assert message in error_of(changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "image": "a.png"}, 'line 1 of {path} has an "image" already'),
        ({"prompt": "a", "image_prompt": " "}, "line 1 of {path} has no text as \"image_prompt\", but ' '"),
        ({"prompt": "a", "image_prompt": 3}, 'line 1 of {path} has no text as "image_prompt", but 3'),
    ],
)
def test_bad_rows(error_of, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    (tmp_path / "a.png").touch()
    path.write_text(json.dumps(row) + "\n")
    assert message.format(path=path) in error_of({"--prompts": path})
    assert not (tmp_path / "out").exists()
