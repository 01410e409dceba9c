"""A reward may do what it likes with what it is given and with the process: neither the run nor other rewards are harmed."""

import os
import random
import sys

import numpy as np
import pytest
import torch

import fastvideo.rewards
from fastvideo.errors import UserError
from fastvideo.parallel.distributed import keyed_generator
from fastvideo.rewards import RewardSpec, load_rewards, score

MEDIA = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
CPU = torch.device("cpu")


def rows() -> list[dict]:
    return [{"prompt": "a", "tags": ["x"]}, {"prompt": "bb", "tags": []}]


def state() -> list:
    drawn = torch.rand(3, generator=keyed_generator(0, "rollout", 1, 0, 0), dtype=torch.float32, device="cpu").tolist()  # as a run draws
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return [os.getcwd(), drawn, *settings, torch.get_default_device(), torch.get_float32_matmul_precision()]


def disturb() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    os.chdir("/")


def test_a_reward_changes_only_its_own_copies():
    def greedy(media, given):
        media.clamp_(min=0)
        for row in given:
            row["prompt"] = "best quality, " + row["prompt"]
            row["tags"].append("seen")
        given.clear()
        return torch.zeros(len(media))

    def honest(media, given):
        assert [row["prompt"] for row in given] == ["a", "bb"] and given[0]["tags"] == ["x"]
        return media.mean((1, 2, 3))

    media, mine = MEDIA.clone(), rows()
    for rewards in ({"greedy": greedy, "honest": honest}, {"honest": honest, "greedy": greedy}):
        assert torch.equal(score(rewards, media, mine)["honest"], MEDIA.mean((1, 2, 3)))
    assert torch.equal(media, MEDIA) and mine == rows()


def test_one_row_given_twice_is_two_rows():
    row = {"prompt": "a"}

    def longer(media, given):
        for each in given:
            each["prompt"] += "!"
        return torch.tensor([float(len(each["prompt"])) for each in given])

    lengths = score({"r": longer}, MEDIA, [row] * 2)
    assert lengths["r"].tolist() == [2, 2] and row == {"prompt": "a"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_reward_leaves_the_process_as_it_was(monkeypatch, fails):
    def load(path, device):
        disturb()
        return reward

    def reward(media, given):
        disturb()
        if fails:
            raise ValueError("no")
        return torch.zeros(2, device="cpu")

    monkeypatch.setitem(fastvideo.rewards.REWARDS, "mine", load)
    before = state()
    rewards = load_rewards([RewardSpec("mine")], CPU)
    assert state() == before
    if fails:
        with pytest.raises(UserError, match="reward 'mine' failed on a batch of 2"):
            score(rewards, MEDIA, rows())
    else:
        score(rewards, MEDIA, rows())
    assert state() == before


def test_sys_exit_is_a_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"reward 'mine' failed .*sys\.exit\(0\)"):
        score({"mine": lambda media, given: sys.exit(0)}, MEDIA, rows())
    monkeypatch.setitem(fastvideo.rewards.REWARDS, "mine", lambda path, device: sys.exit("bye"))
    with pytest.raises(UserError, match=r"reward 'mine' cannot be loaded: .*sys\.exit\('bye'\)"):
        load_rewards([RewardSpec("mine")], CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_scores_of_any_real_type(dtype):
    scores = score({"mine": lambda media, given: torch.tensor([0, 1], dtype=dtype)}, MEDIA, rows())["mine"]
    assert scores.dtype == torch.float32 and scores.tolist() == [0, 1]


def test_scores_leave_their_graph():
    scores = score({"mine": torch.enable_grad()(lambda media, given: torch.ones(2, requires_grad=True) * 3)}, MEDIA, rows())["mine"]
    assert scores.tolist() == [3, 3] and not scores.requires_grad and scores.is_leaf


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(2).to_sparse(), "returned a tensor of torch.float32, torch.sparse_coo"),
        (torch.ones(2, device="meta"), r"returned a tensor without values \(meta\)"),
        (torch.ones(2, dtype=torch.complex64), "returned a tensor of torch.complex64"),
        (torch.ones(2, 1), r"returned shape \(2, 1\) for 2 samples"),
        (torch.tensor([0.0, torch.nan]), "is nan for a sample of the prompt 'bb'"),
        (torch.tensor([1e300, 0.0], dtype=torch.float64), "is inf for a sample of the prompt 'a'"),
        ([0.0, 1.0], "returned a list"),
        (0.5, "returned a float"),
    ],
)
def test_other_scores_are_refused(values, message):
    with pytest.raises(UserError, match=f"reward 'mine' {message}"):
        score({"mine": lambda media, given: values}, MEDIA, rows())
