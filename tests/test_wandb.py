"""wandb, by a small module that refuses what wandb's own does."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastvideo.distributed import UserError, init
from fastvideo.tracking import Tracker


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
