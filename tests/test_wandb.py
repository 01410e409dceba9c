"""wandb, by a small module that refuses what wandb's own does; what a run could not write is told before its models are loaded."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, run_script

from fastvideo.errors import UserError
from fastvideo.parallel.distributed import init
from fastvideo.runs.tracking import Tracker, check


@pytest.fixture(scope="module", autouse=True)
def process_group():
    init()
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["lr=1e-4 #2", "a:b", "what?", "50%", "é" * 80, "n" * 200])
def test_a_run_folder_may_have_any_name(tmp_path, monkeypatch, name):
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda id, **rest: ids.append(id)))
    Tracker(tmp_path / name, ["wandb"], {}, 0)
    assert len(ids[0]) <= 128 and not set(ids[0]) & set("/\\#?%:")


def test_wandb_that_cannot_start_is_a_sentence(tmp_path, monkeypatch):
    def refuse(**rest):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"--trackers wandb cannot start: RuntimeError: api_key .* wandb\.login") as caught:
        Tracker(tmp_path, ["wandb"], {}, 0)
    assert "\n" not in str(caught.value)


def test_wandb_without_a_key_is_told_early(tmp_path, monkeypatch):
    """The module's `login` asks the server; it is content where WANDB_MODE is offline or disabled."""

    def refuse():
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=refuse))
    with pytest.raises(UserError, match=r"^--trackers wandb cannot start: RuntimeError: No API key configured\. Use") as caught:
        check(tmp_path, ["wandb"])
    assert "\n" not in str(caught.value)
    check(tmp_path, ["tensorboard"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(UserError, match="--trackers wandb needs the package wandb: pip install wandb"):
        check(tmp_path, ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda: False))
    check(tmp_path, ["wandb"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tensorboard", b"", "cannot write {run}/tensorboard: Not a directory"),
        ("samples", b"", "cannot write {run}/samples: Not a directory"),
        ("metrics.jsonl", b'{"iteration": "one"}\n{"iteration": 2}\n', "line 1 of {run}/metrics.jsonl is damaged: mend or delete it"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_models(run_flags, tmp_path, file, content, message):
    """The model folder of these runs does not exist, which is told as soon as it is looked at."""
    run = tmp_path / "run"
    run.mkdir()
    (run / file).write_bytes(content)
    flags = run_flags(run, {"--trackers": "tensorboard", "--model": tmp_path / "nowhere"})
    result = run_script(TRAIN, *flags, log=tmp_path / "log")
    assert result.returncode == 2
    assert message.format(run=run) in result.stderr
