"""Rewards are imported when they are asked for, and a user's own is FILE.py:FUNCTION: with it runs go as with the library's, and whatever
such a file does harms neither the run nor other rewards, or is one sentence."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, largest_difference, metrics_of, run_script, weights_of
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.parallel.distributed import keyed_generator
from fastvideo.rewards import REWARDS, RewardSpec, load_rewards, parse_rewards, score
from fastvideo.rewards.names import find_loader, metric_name
from fastvideo.rewards.preflight import preflight, preflight_alone
from fastvideo.runs.run_folder import _meaning

CPU = torch.device("cpu")
MEDIA = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
ROWS = [{"prompt": "a", "tags": ["x"]}, {"prompt": "bb", "tags": []}]
PLAIN = "def mine(media, rows, *, power: float = 1.0, invert: bool = False, name: str = '-'):\n    return media.mean((1, 2, 3)) ** power\n"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in ("beside", "own_light"):
        sys.modules.pop(name, None)


@pytest.fixture
def file(tmp_path):
    """Function that writes a file of rewards."""

    def write(source: str, path: str = "mine.py") -> Path:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
        return tmp_path / path

    return write


def load(*texts: str) -> dict:
    return load_rewards(parse_rewards(texts), CPU, ROWS)


# ------------------------------------------------------------------------------------------------------------------------- names


def test_a_reward_is_imported_when_it_is_asked_for(tmp_path):
    """In a process of its own, from another working folder."""
    source = """
import sys
import fastvideo.rewards

def loaded():
    heavy = {"transformers", "diffusers", "open_clip", "rapidocr_onnxruntime", "requests", "PIL", "shapes"}
    return sorted(name for name in sys.modules if name in heavy or name.startswith(("fastvideo.rewards.", "shapes.rewards")))

print(loaded())
fastvideo.rewards.parse_rewards(["http=http://a:1", "shapes"])
print(loaded())
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    first, then = result.stdout.splitlines()
    always = [f"fastvideo.rewards.{name}" for name in ("isolation", "names", "plugins")]
    assert first == str(always)
    added = {"PIL", "shapes", "shapes.rewards", "fastvideo.rewards.http", "fastvideo.rewards.wire"}
    assert then == str(sorted({*always, *added}))


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_leads_to_a_loader(name):
    assert callable(find_loader(name, None)) and callable(find_loader(f"{name}.label", None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine.py:mine", RewardSpec("mine", file="mine.py")),
        ("my rewards/a=1,b@2/mine.py:mine.one=b/c.py:d,power=2,invert=1@0.5", None),
        ("./clip=1/mine.py:mine", RewardSpec("mine", file="./clip=1/mine.py")),
        ("~/mine.py:mine,name=x", RewardSpec("mine", options={"name": "x"}, file="~/mine.py")),
        ("clip=a/b.py:c", RewardSpec("clip", "a/b.py:c")),
        ("http.a=http://host/x.py:80", RewardSpec("http.a", "http://host/x.py:80")),
    ],
)
def test_names_on_the_command_line(monkeypatch, tmp_path, file, text, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (".", "my rewards/a=1,b@2", "clip=1"):
        file(PLAIN, f"{folder}/mine.py")
    if expected is None:
        expected = RewardSpec("mine.one", "b/c.py:d", 0.5, {"power": 2.0, "invert": True}, "my rewards/a=1,b@2/mine.py")
    assert parse_rewards([text]) == [expected]
    assert metric_name(text) == expected.name


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        (PLAIN, "nowhere/mine.py:mine", "there is no file nowhere/mine.py to take mine from"),
        (PLAIN, "mine.py:other", "mine.py has no function 'other'; its own are mine"),
        ("import torch\nx = 3", "mine.py:x", "mine.py has no function 'x'; its own are none"),
        ("a = 1\nb = c\n", "mine.py:mine", r"mine.py cannot be run: NameError: name 'c' is not defined \(\S+/mine.py, line 2\)$"),
        ("def mine(media, rows)\n    pass", "mine.py:mine", r"mine.py cannot be run: SyntaxError: expected ':' \(\S+/mine.py, line 1\)$"),
        ("\nimport no_such_package", "mine.py:mine", r"ModuleNotFoundError: No module named 'no_such_package' \(\S+/mine.py, line 2\)$"),
        ("import json\n\njson.loads('{')", "mine.py:mine", r"JSONDecodeError: .* \(\S+/mine.py, line 3\)$"),
        ("import beside", "mine.py:mine", r"ZeroDivisionError: .* \(\S+/beside.py, line 1\)$"),
        ("import sys\nsys.exit(3)", "mine.py:mine", r"it called sys.exit\(3\) \(\S+/mine.py, line 2\)$"),
        ("\0", "mine.py:mine", "mine.py cannot be run: "),
        ("x = '\udcff'", "mine.py:mine", "mine.py cannot be run: SyntaxError: .*utf-8"),
        (
            "def mine(pictures, rows): ...",
            "mine.py:mine",
            "must be media and rows, of a reward, or path and device, of its loader, not pictures and",
        ),
        ("def mine(): ...", "mine.py:mine", "of its loader, not none"),
        ("mine = dict", "mine.py:mine", "of its loader, not none"),
        ("def mine(media, rows, scale): ...", "mine.py:mine", "needs a number, a string or a bool as default of its option 'scale'"),
        ("def mine(path, device, scale=None): ...", "mine.py:mine", "as default of its option 'scale=None'"),
        ("def mine(media, rows, **options): ...", "mine.py:mine", r"as default of its option '\*\*options'"),
        (PLAIN, "mine.py:mine,scale=2", "has an unknown option 'scale'; mine knows power, invert, name"),
        (PLAIN, "mine.py:mine,power=much", "the option 'power' in 'mine.py:mine,power=much' is not a number"),
        (PLAIN, "mine.py:mine,invert=yes", "the option 'invert' in 'mine.py:mine,invert=yes' must be 0 or 1"),
        (PLAIN, "mine.py:mine@", "is not of the form NAME"),
        (PLAIN, "mine.py:mine=", "nothing stands after ="),
        (PLAIN, "mine.py:mine@high", "the threshold 'high' in 'mine.py:mine@high' is not a number"),
        (PLAIN, "mine.py:mine.la-bel", "the label 'la-bel' in 'mine.py:mine.la-bel' must have letters, digits and _ alone, as mine.LABEL"),
        (PLAIN, "mine.py", "unknown reward 'mine.py'; .* where your own are FILE.py:FUNCTION in place of NAME"),
        (PLAIN, "mine.py:clip", "has the name of a reward of this library, clip: call the function otherwise"),
        (PLAIN, "mine.py:videoalign.vq", "has the name of a reward of this library, videoalign"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, tmp_path, source, text, message):
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("1 / 0")
    Path("mine.py").write_bytes(source.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"^--rewards: .*{message}"):
        parse_rewards([text])


def test_one_name_twice(file):
    here, there = file(PLAIN), file(PLAIN, "other/mine.py")
    with pytest.raises(UserError, match=r"'mine' is given twice: labels tell them apart, as NAME\.LABEL"):
        parse_rewards([f"{here}:mine", f"{there}:mine"])
    assert [spec.name for spec in parse_rewards([f"{here}:mine", f"{there}:mine.b", f"{here}:mine.c,power=2"])] == [
        "mine",
        "mine.b",
        "mine.c",
    ]


def test_a_file_may_have_state_classes_and_neighbours(file):
    """It is run once, however often it is named; a class can be the loader; `torch.py` beside it hides nothing."""
    file("LIGHT = 7", "own_light.py")
    file("raise RuntimeError", "torch.py")
    source = """
from __future__ import annotations
from dataclasses import dataclass
import torch
RUNS = []

@dataclass
class Light:
    path: str
    device: torch.device
    more: int = 0

    def __call__(self, media, rows):
        import own_light
        RUNS.append(1)
        return torch.full((len(rows),), float(own_light.LIGHT + self.more + 100 * len(RUNS)))
"""
    path = file(source)
    rewards = load(f"{path}:Light,more=3", f"{path}:Light.again")
    assert {name: values.tolist() for name, values in score(rewards, MEDIA, ROWS).items()} == {"Light": [110] * 2, "Light.again": [207] * 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def mine(path, device): raise ValueError(path)", r"reward 'mine' cannot be loaded: ValueError: None \(\S+/mine.py, line 1\)"),
        ("def mine(path, device): pass", "reward 'mine' cannot be loaded: its loader returned a NoneType, not a function"),
        ("import sys\ndef mine(path, device): sys.exit()", r"cannot be loaded: .* sys.exit\(None\) \(\S+/mine.py, line 2\)"),
        ("def mine(media, rows): return rows\nmine.check_rows = lambda rows: rows[9]", r"IndexError: .* \(\S+/mine.py, line 2\)"),
    ],
)
def test_a_loader_that_fails(file, source, message):
    with pytest.raises(UserError, match=message):
        load(f"{file(source)}:mine")
    with pytest.raises(UserError, match=r"mine in .*mine\.py takes no path, but was given mine=x"):
        load(f"{file(PLAIN, 'plain/mine.py')}:mine=x")


def test_rows_are_checked_and_stay(file):
    path = file("def mine(media, rows): ...\nSEEN = []\ndef check(rows): SEEN.extend(rows); rows[0].clear()\nmine.check_rows = check")
    load(f"{path}:mine")
    assert find_loader("mine", str(path))(None, CPU).check_rows.__globals__["SEEN"][1] == {"prompt": "bb", "tags": []}
    assert ROWS == [{"prompt": "a", "tags": ["x"]}, {"prompt": "bb", "tags": []}]


# ------------------------------------------------------------------------------------------------------- what it may do to others

DISTURBANCES = {
    "gradients off": "torch.set_grad_enabled(False)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "seeds": "torch.manual_seed(7); random.seed(7); np.random.seed(7)",
    "folder": "os.chdir('/')",
    "signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
}
DISTURBING = """
import os, random, signal
import numpy as np
import torch

def disturb(when):
    if when in WHEN:
        CODE

disturb("run")

def mine(path, device):
    disturb("load")
    def reward(media, rows):
        disturb("call")
        if FAILS:
            raise ValueError("no")
        return torch.zeros(2, device="cpu")
    return reward
"""


def state() -> list:
    """Of this process, and of what a run would draw in it."""
    drawn = torch.rand(3, generator=keyed_generator(0, "rollout", 1, 0, 0), dtype=torch.float32, device="cpu").tolist()
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    settings += (
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.is_autocast_enabled("cpu"),
    )
    return [os.getcwd(), drawn, *settings, signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("when", [["run"], ["load"], ["call"]], ids=str)
@pytest.mark.parametrize("code", DISTURBANCES.values(), ids=DISTURBANCES)
def test_what_it_changes_does_not_last(file, code, when):
    before = state()
    for fails in (False, True):
        source = DISTURBING.replace("WHEN", str(when)).replace("CODE", code).replace("FAILS", str(fails))
        rewards = load(f"{file(source, f'{fails}/mine.py')}:mine")
        assert state() == before
        if fails:
            with pytest.raises(UserError, match=r"reward 'mine' failed on a batch of 2 .*ValueError: no"):
                score(rewards, MEDIA, ROWS)
        else:
            score(rewards, MEDIA, ROWS)
        assert state() == before
    if "seed" in code:  # it did draw
        torch.manual_seed(0), random.seed(0), np.random.seed(0)


@pytest.mark.parametrize(
    "code",
    [
        "media.clamp_(min=0)",
        "media.requires_grad_()",
        "media.data = media.data.half()",
        "media.resize_(1)",
        "rows.clear()",
        "[row.clear() for row in rows]",
        "rows[0]['prompt'] += '!'; rows[0]['tags'].append('seen')",
        "rows[:] = rows[:1] * 2",
    ],
)
def test_what_it_is_given_is_its_own(file, code):
    greedy = file(f"import torch\n@torch.enable_grad()\ndef greedy(media, rows):\n    {code}\n    return torch.zeros(2)", "greedy.py")
    seen = f"assert rows == {ROWS} and not media.requires_grad\n    return torch.from_numpy(media.numpy()).mean((1, 2, 3))"
    honest = file(f"import torch\ndef honest(media, rows):\n    {seen}", "honest.py")
    media, rows = MEDIA.clone(), json.loads(json.dumps(ROWS))
    scores = score(load(f"{greedy}:greedy", f"{honest}:honest", f"{greedy}:greedy.b"), media, rows)
    assert torch.equal(scores["honest"], MEDIA.mean((1, 2, 3)))
    assert torch.equal(media, MEDIA) and not media.requires_grad and rows == ROWS


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        *((f"torch.tensor([0, 1]).to(torch.{dtype})", [0, 1]) for dtype in ("float16", "bfloat16", "float64", "int64", "uint8", "bool")),
        ("torch.set_grad_enabled(True) and torch.ones(2, requires_grad=True) * 3", [3, 3]),
        ("torch.nn.Parameter(torch.ones(2))", [1, 1]),
        ("torch.tensor(2.0).expand(2)", [2, 2]),
        ("torch.inference_mode()(lambda: torch.ones(2))()", [1, 1]),
        ("[0.5, 1]", "returned a list; it must be a tensor of shape (2,)"),
        ("np.zeros(2)", "returned a ndarray"),
        ("torch.ones(2).tolist()[0]", "returned a float"),
        ("None", "returned a NoneType"),
        ("torch.ones(2).to_sparse()", "returned a tensor of torch.float32, torch.sparse_coo; it must be dense and of real numbers"),
        ("torch.ones(2, device='meta')", "returned a tensor without values (meta)"),
        ("torch.ones(2, dtype=torch.complex64)", "returned a tensor of torch.complex64"),
        ("torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])", "returned a tensor of torch.float32"),
        ("torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)", "returned a tensor of torch.quint8"),
        ("torch.ones(2, 1)", "returned shape (2, 1) for 2 samples; it must be (2,)"),
        ("torch.ones(())", "returned shape () for 2 samples"),
        ("torch.tensor([0.0, float('nan')])", "is nan for a sample of the prompt 'bb'"),
        ("sys.exit(0)", "failed on a batch of 2 that begins with the prompt 'a': RuntimeError: it called sys.exit(0) ("),
    ],
)
def test_what_it_returns(file, returned, expected):
    path = file(f"import sys\nimport numpy as np\nimport torch\n\ndef mine(media, rows):\n    return {returned}")
    rewards = load(f"{path}:mine")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^reward 'mine' {re.escape(expected)}") as raised:
            score(rewards, MEDIA, ROWS)
        assert "sys" not in returned or str(raised.value).endswith(f"{path}, line 6)")
    else:
        scores = score(rewards, MEDIA, ROWS)["mine"]
        assert scores.tolist() == expected and scores.dtype == torch.float32
        assert not scores.requires_grad and not scores.is_inference()


def test_a_tensor_that_is_given_again(file):
    path = file("import torch\nSAME = torch.zeros(2)\ndef mine(media, rows, add=1.0):\n    return SAME.add_(add)")
    rewards = load(f"{path}:mine", f"{path}:mine.b,add=2")
    assert {name: values.tolist() for name, values in score(rewards, MEDIA, ROWS).items()} == {"mine": [1, 1], "mine.b": [3, 3]}
    with pytest.raises(UserError, match="preflight: reward 'mine' gave "):
        preflight(load(f"{path}:mine"), MEDIA, ROWS[0])


# --------------------------------------------------------------------------------------------------------------------- end to end

# Aesthetic, of the worst manners.
WICKED = """
import os, random, signal
import numpy as np
import torch
from shapes.rewards import load_aesthetic

def disturb():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(7); random.seed(7); np.random.seed(7)
    os.chdir("/")

disturb()

def wicked(path, device, *, shift: float = 0.0):
    honest = load_aesthetic(None, device)
    disturb()

    def reward(media, rows):
        values = honest(media, rows) + shift
        media.zero_()
        rows.clear()
        disturb()
        torch.set_grad_enabled(True)
        return values.requires_grad_() * 1

    return reward
"""


def test_a_run_with_a_reward_of_ones_own(train, file, tmp_path):
    """On two processes, with option, threshold and a held-out one; resumed once the file has moved. All is as with `aesthetic`."""
    file(WICKED, "my rewards/wicked.py")
    two = {"--prompts_per_iteration": 4, "--rollout_batch_size": 4, "--checkpoint_every": 1}
    held_out = {"--held_out_rewards": f"{file(PLAIN)}:mine.light"}
    train(tmp_path / "expected", two, {"--rewards": "aesthetic@0.58", "--iterations": 2}, processes=2)
    for folder, iterations in (("my rewards", 1), ("moved", 2)):
        reward = f"{tmp_path / folder / 'wicked.py'}:wicked,shift=0.25@0.83"
        train(tmp_path / "run", two, held_out, {"--rewards": reward, "--iterations": iterations}, processes=2)
        shutil.move(tmp_path / folder, tmp_path / "moved") if folder != "moved" else None
    rows, expected = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "expected")
    assert all("held_out/mine.light_mean" in row for row in rows)
    rows = [{key.replace("wicked", "aesthetic"): value for key, value in row.items() if "held_out" not in key} for row in rows]
    assert rows == expected and 0 < expected[0]["reward/aesthetic_mean"] < 1
    assert largest_difference(*(weights_of(tmp_path / run / "export" / "transformer") for run in ("run", "expected"))) == 0

    moved = tmp_path / "moved" / "wicked.py"
    for text in (f"{moved}:wicked,shift=0.25@0.7", f"{moved}:wicked.b,shift=0.25@0.83", f"{shutil.copy(moved, tmp_path / 'w.py')}:wicked"):
        refused = train(tmp_path / "run", two, held_out, {"--rewards": text, "--iterations": 3}, check=False)
        assert refused.returncode == 2 and "was started with other arguments: --rewards was" in refused.stderr


@pytest.mark.parametrize(
    ("source", "message"), [("1 / 0", "cannot be run: ZeroDivisionError"), ("import sys; sys.exit()", "sys.exit(None)")]
)
def test_a_broken_file_ends_two_processes_with_one_sentence(train, file, tmp_path, source, message):
    result = train(tmp_path / "run", {"--rewards": f"{file(source)}:mine"}, processes=2, check=False)
    assert result.returncode == 2
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith("error: --rewards: ") and message in sentence and sentence.endswith(f"{tmp_path / 'mine.py'}, line 1)")


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("/a b/mine.py:f=/w/x.pt,power=2@0.5", "mine.py:f=x.pt,power=2@0.5", True),
        ("~/mine.py:f", "a=b/c/mine.py:f", True),
        ("mine.py:f", "other.py:f", False),
        ("mine.py:f", "mine.py:g", False),
        ("mine.py:f,batch=1", "mine.py:f,batch=2", False),
        ("http_like.py:f=a", "http_like.py:f=b", False),
        ("http.py:http=a", "http.py:http=b", False),
    ],
)
def test_the_same_file_elsewhere(before, now, same):
    assert (_meaning("rewards", [before]) == _meaning("rewards", [now])) == same


def test_the_server_takes_it(file, capsys):
    """It is called by the function's name, and tried on a plain picture or clip."""
    path = file(PLAIN + "\ndef clips(media, rows):\n    return media.mean((1, 2, 3, 4))\n")
    preflight_alone(load(f"{path}:mine@0.5", f"{path}:clips.a"), CPU)
    assert re.findall(r"preflight: ([\w.]+): [\d.]+ s a sample", capsys.readouterr().out) == ["mine", "clips.a"]


# ------------------------------------------------------------------------------------------------------------------------- docs


def test_the_examples_of_the_page(tmp_path, monkeypatch, prompt_file):
    """Each is written to its file and named as the page names it; evaluate.py scores by both."""
    page = (REPOSITORY / "docs" / "rewards.md").read_text()
    section = page.split("## A reward of your own")[1].split("\n## ")[0]
    for name, source in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL):
        for folder in (tmp_path, tmp_path / "my rewards", tmp_path / "rewards"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(source)
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "sunset.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [re.split(r"\s{2,}#", line)[0] for line in section.splitlines() if line.startswith("--rewards ")]
    named = [[text for text in re.findall(r'"[^"]*"|\S+', line.removeprefix("--rewards "))] for line in lines]
    assert [len(texts) for texts in named] == [1, 2, 2, 1]
    red = torch.tensor([1.0, -1, -1])[None, :, None, None].expand(2, 3, 32, 32)
    scores = {}
    for texts in named:
        scores |= score(load(*(text.strip('"') for text in texts)), red, [{"prompt": "a red circle"}] * 2)
    expected = {"brightness": 1 / 3, "brightness.dark": 1 / 27, "palette": 0}
    assert {name: scores[name].tolist() for name in expected} == {
        name: [pytest.approx(value, abs=1e-6)] * 2 for name, value in expected.items()
    }
    assert score(load(named[1][0].strip('"')), red, ROWS)["brightness"].tolist() == [0, 0]  # 1/9 is not above 0.5

    flags = {
        "--model": REPOSITORY / "shapes" / "models" / "flux",
        "--prompts": prompt_file,
        "--num_seeds": 1,
        "--output_dir": tmp_path / "out",
    }
    flags |= {"--rewards": (f"{tmp_path}/brightness.py:brightness", f"{tmp_path}/palette.py:palette={tmp_path}/sunset.png")}
    result = run_script(REPOSITORY / "evaluate.py", flags, log=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    base = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["base"]["prompts"]
    assert 0 < base["brightness"]["mean"] < 1 and -1 < base["palette"]["mean"] < 0
