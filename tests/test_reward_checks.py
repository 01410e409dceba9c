"""Around the rewards: what is logged of each, held-out rewards, and the check before training."""

import json

import pytest
import torch
from conftest import REPOSITORY, metrics_of

from fastvideo.errors import UserError
from fastvideo.rewards import load_rewards, parse_rewards, score
from fastvideo.rewards.preflight import preflight, preflight_alone
from fastvideo.rewards.statistics import group_statistics

CLIP = REPOSITORY / "shapes" / "models" / "clip"
PICTURES, CLIPS = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 9, 32, 32)


def test_each_reward_is_seen_alone_in_the_log():
    steady, collapsed, watched = torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[3.0, 3.0], [1.0, 2.0]]), torch.ones(2, 2)
    metrics = group_statistics({"steady": steady, "collapsed": collapsed, "watched": watched}, ("steady", "collapsed"))
    assert [metrics[f"reward/steady_{key}"] for key in ("mean", "min", "max", "zero_std_frac")] == [2, 0, 5, 0]
    assert metrics["reward/steady_std"] == pytest.approx(steady.std().item())
    assert metrics["reward/steady_group_std"] == pytest.approx((0.5**0.5 + 4.5**0.5) / 2)
    assert metrics["reward/collapsed_zero_std_frac"] == 0.5
    assert metrics["held_out/watched_mean"] == 1 and metrics["held_out/watched_zero_std_frac"] == 1
    assert metrics["reward/zero_std_frac"] == 0  # in each group one of the trained rewards tells the samples apart
    assert group_statistics({"collapsed": collapsed, "watched": watched}, ("collapsed",))["reward/zero_std_frac"] == 0.5


def test_a_threshold_has_to_be_passed():
    """A blank picture has exactly 0 of a caption: that is above -0.1 and not above 0."""
    rewards = load_rewards(parse_rewards(["shapes", "shapes.low@-0.1", "shapes.equal@0"]), torch.device("cpu"))
    scores = score(rewards, PICTURES, [{"prompt": "a red circle"}] * 2)
    assert [scores[name].tolist() for name in rewards] == [[0, 0], [1, 1], [0, 0]]


# --------------------------------------------------------------------------------------------------------------- held-out rewards


def test_a_held_out_reward_is_logged_and_changes_nothing(train, finished_run, tmp_path):
    train(tmp_path / "run", {"--held_out_rewards": ("shapes", "shapes_strict")})
    rows = metrics_of(tmp_path / "run")
    assert all(0 <= row["held_out/shapes_mean"] <= 1 and "held_out/shapes_strict_mean" in row for row in rows)
    trained = [{key: value for key, value in row.items() if not key.startswith("held_out/")} for row in rows]
    assert trained == metrics_of(finished_run)[:3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--held_out_rewards": "aesthetic"}, "--rewards: 'aesthetic' is given twice"),
        ({"--held_out_rewards": "beauty"}, "--rewards: unknown reward 'beauty'"),
        ({"--reward_weights": (1, 2), "--held_out_rewards": "shapes"}, "--reward_weights has 2 numbers for 1 --rewards"),
        ({"--reward_weights": "nan"}, "--reward_weights are nan, but must be finite"),
        ({"--rewards": "aesthetic@nan"}, "the threshold 'nan' in 'aesthetic@nan' is not a number"),
        (
            {"--reward_weights": 0},
            "gives 'aesthetic' 0: what is logged and never trained on belongs to --held_out_rewards",
        ),
        ({"--rewards": "aesthetic@"}, "'aesthetic@' is not of the form NAME[=PATH][,OPTION=VALUE...][@THRESHOLD]"),
        ({"--rewards": "videoalign=F"}, "known names are videoalign.vq, videoalign.mq, videoalign.ta, written as"),
        ({"--rewards": "clip=F,dtype=auto,dtype=auto"}, "gives the option 'dtype' twice"),
    ],
    ids=["twice", "unknown", "weights", "weight_nan", "threshold_nan", "weight_0", "empty", "head", "option_twice"],
)
def test_bad_flags(train, tmp_path, flags, message):
    result = train(tmp_path / "run", flags, check=False)
    assert result.returncode == 2
    assert message in result.stderr


# ---------------------------------------------------------------------------------------------------------------------- preflight


def test_preflight_says_what_rewards_cost(capsys):
    device = torch.device("cpu")
    rewards = load_rewards(parse_rewards([f"clip={CLIP}@0.99", "shapes.labelled", "aesthetic"]), device)
    preflight(rewards, PICTURES, {"prompt": "a red circle"})
    of_clips = ["visual", "motion", "shapes", "shapes_strict.labelled"]
    preflight(load_rewards(parse_rewards(of_clips), device), CLIPS, {"prompt": "a red circle moving right"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["clip", "shapes.labelled", "aesthetic", *of_clips]
    assert all("s a sample" in line and "GiB" in line for line in lines)
    assert "1 for a drawing of 'a red circle'" in lines[1]
    assert not any("noise" in line for line in lines[4:])  # nothing is known of them


def test_preflight_refuses_a_reward_without_trained_weights(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast
    from transformers.image_processing_base import ImageProcessingMixin

    torch.manual_seed(0)
    CLIPModel(CLIPConfig.from_pretrained(CLIP)).save_pretrained(tmp_path)
    CLIPTokenizerFast.from_pretrained(CLIP).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ImageProcessingMixin.get_image_processor_dict(CLIP)[0]))
    rewards = load_rewards(parse_rewards([f"clip={tmp_path}"]), torch.device("cpu"))
    plain = rewards["clip"]
    rewards["clip"] = lambda media, rows: plain(media, rows).round(decimals=1)  # a random network is nearly indifferent
    with pytest.raises(UserError, match="preflight: reward 'clip' gives a drawing of 'a red circle'"):
        preflight(rewards, PICTURES, {"prompt": "a red circle"})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda media, rows: torch.rand(len(rows)), "and then"),
        (lambda media, rows: torch.full((len(rows),), torch.nan), "is nan"),
        (lambda media, rows: torch.zeros(len(rows), 1), "returned shape"),
        (lambda media, rows: media.no_such_thing, "AttributeError"),
        (lambda media, rows: [0.5] * len(rows), "returned a list; it must be a tensor"),
    ],
    ids=["changing", "nan", "shape", "error", "list"],
)
def test_preflight_refuses_a_broken_reward(reward, message):
    with pytest.raises(UserError, match=message):
        preflight({"mine": reward}, PICTURES, {"prompt": "a red circle"})


def test_preflight_of_a_servers_reward_by_its_name_there():
    """A threshold on the server may make all equal; a reward of this process has none there."""

    def by_server(served: str, *scores: float):
        def reward(media, rows):
            return torch.tensor(scores if len(rows) == 2 else (0.0,))

        reward.served = served
        return reward

    preflight({"http.mine": by_server("clip.large", 1, 0)}, PICTURES[:1], {"prompt": "a dog"})
    preflight({"http": by_server("clip", 0, 0)}, PICTURES[:1], {"prompt": "a dog"})
    preflight({"http.clip": by_server("unknown", 0, 1)}, PICTURES[:1], {"prompt": "a dog"})
    for name, reward in {"http.mine": by_server("clip", 0, 1), "clip": by_server("", 0, 0)}.items():
        with pytest.raises(UserError, match="gives a drawing of 'a red circle' 0 and noise"):
            preflight({name: reward}, PICTURES[:1], {"prompt": "a dog"})


def test_preflight_without_a_run(capsys):
    """Each reward gets what it takes: small pictures, large ones, clips."""
    device = torch.device("cpu")
    names = ["shapes", "shapes_strict.labelled", "aesthetic@0.99", "motion", "visual", f"clip={CLIP}"]
    preflight_alone(load_rewards(parse_rewards([*names, "fidelity", "http=http://127.0.0.1:1"]), device), device)
    lines = capsys.readouterr().out.splitlines()
    assert ["for a drawing of 'a red circle'" in line for line in lines] == [True, True, True, False, True, True, False, False]
    assert all("not checked before it is asked" in line for line in lines[6:])

    preflight_alone({"mine": lambda media, rows: media.mean((1, 2, 3, 4))}, device)  # of clips
    with pytest.raises(UserError, match=r"on a picture and a clip of 256 x 256: .*KeyError.*; and .*KeyError: 'mask'"):
        preflight_alone({"mine": lambda media, rows: rows[0]["mask"]}, device)
    with pytest.raises(UserError, match="is nan"):
        preflight_alone({"mine": lambda media, rows: torch.full((len(rows),), torch.nan)}, device)


def test_a_broken_reward_stops_the_run_before_iteration_1(train, tmp_path):
    """`motion` is for clips."""
    result = train(tmp_path / "run", {"--rewards": "motion"}, check=False)
    assert result.returncode == 2
    assert "reward 'motion' failed" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
