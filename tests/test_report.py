"""The report of runs: its numbers are those of metrics.jsonl, it is one file, and a browser shows it on any screen."""

import html
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_script

from fastvideo.errors import UserError
from fastvideo.report.charts import MOST_POINTS
from fastvideo.report.page import page
from fastvideo.report.read import markdown_blocks, read_runs

REPORT = REPOSITORY / "fastvideo" / "report" / "__main__.py"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
NASTY = 'a <b>"red" circle</b> & <script>alert(1)</script> </script>'


class Tables(HTMLParser):
    """Of a page: `rows`, the cells' text of each row of its tables, and `data`, what the script reads."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.inside, self.data = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("td", "th", "script"):
            self.inside = "data" if ("id", "data") in attributes else tag

    def handle_endtag(self, tag):
        if tag in ("td", "th", "script"):
            self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self.inside == "data":
            self.data += data


def report(*folders: Path, window: int = 10, clips: int = 4) -> tuple[str, Tables, dict]:
    """The page, its tables, and the numbers that it shows under the pointer."""
    text = page(read_runs(folders), window, clips)
    tables = Tables(text)
    return text, tables, json.loads(tables.data)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_run(folder: Path, rows: list[dict], **arguments: object) -> Path:
    """A run folder that holds no more than metrics, and a manifest if there are arguments."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, **row}) + "\n" for i, row in enumerate(rows, 1)))
    if arguments:
        (folder / "manifest.json").write_text(json.dumps({"script": "train.py", "arguments": arguments, "packages": {}, "history": []}))
    return folder


@pytest.fixture(scope="module")
def runs(train, prompt_file, tmp_path_factory) -> dict[str, Path]:
    """Real runs of three and two iterations: of pictures, with a held-out reward, and of clips. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "pictures", {"--held_out_rewards": "shapes", "--sample_every": 1})
    prompts, model = folder / "prompts.txt", REPOSITORY / "shapes" / "models" / "hunyuan"
    prompts.write_text("\n".join((REPOSITORY / "shapes" / "prompts" / "video_train.txt").read_text().splitlines()[:3]) + "\n")
    flags = {"--model": model, "--prompts": prompts, "--output_dir": folder / "embeddings"}
    embedded = run_script(REPOSITORY / "preprocess" / "embed_hunyuan.py", flags, log=folder / "embed.log")
    assert embedded.returncode == 0, embedded.stderr
    flags = {"--model": model, "--embeddings": folder / "embeddings", "--rewards": "visual", "--num_frames": 5, "--iterations": 2}
    flags |= {"--num_generations": 2, "--updates_per_iteration": 1, "--sample_every": 1}
    train(folder / "clips", flags, script=REPOSITORY / "train_grpo_hunyuan.py")
    return {"pictures": folder / "pictures", "clips": folder / "clips"}


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_all_metrics_are_shown_as_they_were_logged(runs, kind):
    """Each value and each mean of the last two, in all metrics but the count of samples."""
    rows = metrics(runs[kind])
    _, _, shown = report(runs[kind], window=2)
    assert shown["charts"].keys() == rows[0].keys() - {"iteration", "samples"}
    for key, found in shown["charts"].items():
        (curve,) = found["curves"]
        window = 1 if key in ("policy/lr", "memory/peak_gib") else 2
        means = [sum(row[key] for row in rows[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(rows))]
        assert curve["x"] == [row["iteration"] for row in rows]
        assert curve["value"] == pytest.approx([row[key] for row in rows], rel=1e-5, abs=1e-12)
        assert curve["mean"] == pytest.approx(means, rel=1e-5, abs=1e-12)


def test_tables_have_the_runs_numbers(runs):
    rows, manifest = metrics(runs["pictures"]), json.loads((runs["pictures"] / "manifest.json").read_text())
    _, tables, _ = report(runs["pictures"], window=2)
    for title, key in (("aesthetic", "reward/aesthetic_mean"), ("shapes (held out)", "held_out/shapes_mean")):
        first, last = sum(row[key] for row in rows[:2]) / 2, sum(row[key] for row in rows[-2:]) / 2
        assert [title, f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"] in tables.rows
    (overview,) = (row for row in tables.rows if "train_grpo_flux.py" in row and len(row) == 6)
    assert tables.rows[0][3] == "samples drawn"
    assert overview[2:4] == ["3 of 3, exported", str(rows[-1]["samples"])] and overview[5] == "1 x cpu"
    shown = {row[0]: row[1] for row in tables.rows if len(row) == 2}
    for name, value in manifest["arguments"].items():
        assert shown[f"--{name}"] == (value if isinstance(value, str) else json.dumps(value))
    assert shown["torch"] == manifest["packages"]["torch"]


def test_time_is_split_by_phase(runs):
    rows = metrics(runs["pictures"])
    text, _, _ = report(runs["pictures"])
    whole = sum(row["time/iteration_s"] for row in rows)
    widths = re.findall(r'<i style="width:([\d.]+)%;', text)
    phases = [key for key in rows[0] if key.startswith("time/") and key != "time/iteration_s"]
    shares = [100 * sum(row[key] for row in rows) / whole for key in phases]
    assert [float(width) for width in widths] == pytest.approx([*shares, 100 - sum(shares)], abs=0.02)


def test_curves_are_drawn_where_their_axes_say(tmp_path):
    """Each point of the thin curve, read by the labels of both axes."""
    values = [0.31, 0.29, 0.74, 0.5, 0.62]
    text, _, _ = report(write_run(tmp_path / "run", [{"reward/taste_mean": value} for value in values]))
    (path,) = re.findall(r'<path class="thin c0" d="M([^"]*)"', text)
    axes = []
    for axis, side in (("x", "left"), ("y", "top")):
        (low, low_at), *_, (high, high_at) = sorted(
            (float(label), float(place)) for place, label in re.findall(rf'<span class="{axis}" style="{side}:([\d.]+)%">([^<]*)<', text)
        )
        axes.append(lambda at, low=low, low_at=low_at, high=high, high_at=high_at: low + (at - low_at) * (high - low) / (high_at - low_at))
    points = [tuple(axis(float(at) / 10) for axis, at in zip(axes, point.split())) for point in path.split("L")]
    assert points == [pytest.approx(point, abs=0.003) for point in enumerate(values, 1)]


def test_pictures_and_clips_are_inside(runs):
    for kind, grids, clips in (("pictures", ("000001", "000003"), 0), ("clips", ("000001", "000002"), 2 * 4)):
        text, _, _ = report(runs[kind])
        found = re.findall(r"<video [^>]*src=\"data:video/mp4;base64,", text)
        assert len(found) == clips
        assert text.count("data:image/png;base64,") == len(grids)
        for name in grids:
            assert (runs[kind] / "samples" / f"iteration_{name}.txt").read_text().split("\n")[0] in html.unescape(text)


def test_a_large_picture_becomes_smaller(runs, tmp_path):
    """As 8 samples of 720 pixels, which as a PNG of noise have 12 MB."""
    import torch

    from fastvideo.media import save_samples

    run = write_run(tmp_path / "run", [{}])
    path = save_samples(run / "samples" / "iteration_000001.png", torch.rand(8, 3, 720, 720) * 2 - 1, ["a prompt"] * 8)
    text, _, _ = report(run)
    assert len(text) < 3e6 < path.stat().st_size
    assert "data:image/jpeg;base64," in text


def test_differences_of_arguments(tmp_path):
    one = write_run(tmp_path / "one" / "run", [{}], seed=0, learning_rate=1e-4, rewards=["clip"], output_dir="one")
    other = write_run(tmp_path / "other" / "run", [{}], seed=0, learning_rate=2e-4, rewards=["clip", "ocr"], output_dir="other", new=1)
    text, tables, _ = report(one, other)
    start = tables.rows.index(["", "one/run", "other/run"])
    assert tables.rows[start + 1 : start + 4] == [
        ["--learning_rate", "0.0001", "0.0002"],
        ["--rewards", '["clip"]', '["clip", "ocr"]'],
        ["--new", "", "1"],
    ]
    assert "<title>one/run, other/run</title>" in text


def test_a_reward_that_one_run_holds_out_is_one_chart(tmp_path):
    one = write_run(tmp_path / "one", [{"reward/taste_mean": 0.1, "held_out/clip_mean": 0.2}] * 2)
    other = write_run(tmp_path / "other", [{"reward/clip_mean": 0.3}] * 3)
    text, tables, shown = report(one, other)
    assert shown["charts"].keys() == {"reward/taste_mean", "held_out/clip_mean"}
    assert [curve["value"] for curve in shown["charts"]["held_out/clip_mean"]["curves"]] == [[0.2] * 2, [0.3] * 3]
    assert [row[:3] for row in tables.rows[4:7]] == [
        ["taste", "one", "0.1000"],
        ["clip (held out)", "one", "0.2000"],
        ["clip", "other", "0.3000"],
    ]
    assert "clip<small>Held out in the run one.</small>" in text


def test_no_two_runs_look_the_same(tmp_path):
    """In tables, legends, bars and curves, and in the script: classes that the style sheet has."""
    folders = [write_run(tmp_path / f"run{i}", [{"reward/taste_mean": i, "time/iteration_s": 1.0}] * 2) for i in range(32)]
    text, _, shown = report(*folders)
    assert len(set(shown["colours"])) == 32
    for number, classes in enumerate(shown["colours"]):
        name = f'<span class="key {classes}"></span>run{number}<'
        assert text.count(name) >= 6  # the overview, the rewards, a legend and the heading of a bar
        assert f'<div class="{classes}"><p>A mean iteration' in text
        assert text.count(f'<path class="{classes}" d="') == 2
    for name in {name for classes in shown["colours"] for name in classes.split()}:
        assert re.search(rf"\.{name} {{ --", text) and (name[0] == "c" or f"path.{name} {{ stroke-dasharray" in text)


def test_a_single_grid_is_not_called_the_first_and_the_last(tmp_path):
    run = write_run(tmp_path / "run", [{}])
    for number, sentence in ((1, "<p>Without noise in the steps.</p>"), (5, "at the first and the last time that samples were drawn")):
        (run / "samples").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "docs" / "images" / "quickstart_samples.png", run / "samples" / f"iteration_{number:06d}.png")
        assert sentence in report(run)[0]


def test_what_is_not_finite_is_left_out(tmp_path):
    rows = [{"policy/grad_norm": value} for value in (1.0, math.nan, 3.0, math.inf, 5.0, 6.0)]
    text, _, shown = report(write_run(tmp_path / "run", rows), window=2)
    (curve,) = shown["charts"]["policy/grad_norm"]["curves"]
    assert curve["value"] == [1, None, 3, None, 5, 6] and curve["mean"] == [1, 1, 3, 3, 5, 5.5]
    (path,) = re.findall(r'<path class="thin c0" d="([^"]*)"', text)
    assert path.count("M") == 3 and path.count("h0") == 2  # two points alone, and a line
    assert "2 values are not finite" in text


def test_thousands_of_iterations_keep_their_spikes(tmp_path):
    rows = [{"policy/approx_kl": 0.1 + 0.01 * (i % 7)} for i in range(20_000)]
    rows[12_345]["policy/approx_kl"], rows[15_001]["policy/approx_kl"] = 9.0, -1.0
    text, _, shown = report(write_run(tmp_path / "run", rows))
    (curve,) = shown["charts"]["policy/approx_kl"]["curves"]
    assert len(curve["x"]) <= MOST_POINTS + 2 and (curve["x"][0], curve["x"][-1]) == (1, 20_000)
    assert (12_346, 9.0) in zip(curve["x"], curve["value"]) and (15_002, -1.0) in zip(curve["x"], curve["value"])
    assert len(text) < 100_000


def test_a_run_that_goes_on_and_one_without_a_manifest(tmp_path):
    """One iteration is a dot; a line that is being written is no line yet; others' files are left alone; anything else may be missing."""
    run = write_run(tmp_path / "run", [{"reward/taste_mean": 0.5}], iterations=7)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "reward/ta')
    for other in ("samples/notes.png", "samples/iteration_best.png", "evaluation/samples/mine.mp4"):
        damaged(run, other, "")
    text, tables, shown = report(run, write_run(tmp_path / "bare", [{}]))
    assert ["run", "train.py", "1 of 7, not at its end", "?", "0 s", "?"] in tables.rows
    assert shown["charts"]["reward/taste_mean"]["curves"][0]["value"] == [0.5]
    assert re.search(r'<path class="c0" d="M\d+ \d+h0"', text)
    assert "</span>bare has no manifest.json" in text


def test_nothing_of_a_run_becomes_markup(tmp_path):
    run = write_run(tmp_path / NASTY.replace("/", "|"), [{f"reward/{NASTY}_mean": 0.5}], model=NASTY)
    (run / "samples").mkdir()
    shutil.copy(REPOSITORY / "docs" / "images" / "quickstart_samples.png", run / "samples" / "iteration_000001.png")
    (run / "samples" / "iteration_000001.txt").write_text(f"{NASTY}\n")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.md").write_text(f"# {NASTY}\n\n{NASTY}\n\n| {NASTY} |\n| --- |\n| {NASTY} |\n")
    for clip in ("samples/iteration_000001_0.mp4", "evaluation/samples/base_0.mp4"):
        (run / clip).parent.mkdir(exist_ok=True)
        (run / clip).touch()
    (run / "evaluation" / "samples.txt").write_text(f"base 0.5 {NASTY}\n")
    text, tables, shown = report(run)
    assert text.count("<video") == 2 and html.escape(f"base 0.5 {NASTY}") in text
    assert "<b>" not in text and "<script>alert" not in text and text.count("</script>") == 2
    assert shown["runs"] == [NASTY.replace("/", "|")] and list(shown["charts"]) == [f"reward/{NASTY}_mean"]
    assert [NASTY] in tables.rows and ["--model", NASTY] in tables.rows


def test_markdown_of_an_evaluation():
    text = "# Evaluation\n\nBehind ± is half.\n\n## prompts: 6 pictures\n\n"
    text += "| reward | mean |\n| --- | --- |\n| clip, a \\| b | 0.5 ± 0.1 |\n\n| other |\n| --- |\n"
    assert markdown_blocks(text) == [
        ("heading", "Evaluation"),
        ("text", "Behind ± is half."),
        ("heading", "prompts: 6 pictures"),
        ("table", [["reward", "mean"], ["clip, a | b", "0.5 ± 0.1"]]),
        ("table", [["other"]]),
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: [folder / "nowhere"], "there is no run folder .*nowhere"),
        (lambda folder: [folder], "has no metrics.jsonl: it is no run folder, or its run has not ended an iteration yet"),
        (lambda folder: [write_run(folder / "run", [])], "run/metrics.jsonl has no iteration yet"),
        (lambda folder: [write_run(folder / "run", [{}])] * 2, "the run .*/run is given twice"),
        (lambda folder: [write_run(folder / "run", [{}, {"x": "y"}, {}])], "line 2 of .*metrics.jsonl is damaged"),
        (lambda folder: [damaged(write_run(folder / "run", [{}]), "manifest.json", "{")], "run/manifest.json cannot be read: Expecting"),
        (lambda folder: [damaged(write_run(folder / "run", [{}]), "manifest.json", "[]")], "manifest.json is not the manifest of a run"),
        (lambda folder: [damaged(write_run(folder / "run", [{}]), "samples/iteration_000001.png", "{")], "the picture .* cannot be read"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        report(*make(tmp_path))


def damaged(run: Path, name: str, content: str) -> Path:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(content)
    return run


def test_the_command(runs, tmp_path):
    """The page goes into the one run's folder, or where --output says; a mistake is one sentence and exit code 2."""
    run = shutil.copytree(runs["pictures"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    done = run_script(REPORT, run, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"report: {run}/report.html (")
    assert (run / "report.html").stat().st_size < 2e6  # 20 MB are allowed to a run of the quickstart, with its pictures of the same size
    done = run_script(REPORT, run, runs["clips"], {"--output": tmp_path / "both.html", "--clips": 1}, log=tmp_path / "log")
    assert done.returncode == 0 and (tmp_path / "both.html").read_text().count("<video") == 2
    for flags, sentence in (
        ((tmp_path / "nowhere",), f"error: there is no run folder {tmp_path}/nowhere\n"),
        ((run, {"--window": 0}), "error: --window is 0, but must be 1 or more\n"),
        ((run, {"--output": tmp_path}), f"error: --output {tmp_path} is a folder: name a file in it\n"),
        ((run, {"--output": tmp_path / "new" / "a.html"}), f"error: --output {tmp_path}/new/a.html: there is no folder {tmp_path}/new\n"),
        ((run,) * 33, "error: 33 runs are given, but 32 at most can be told apart on one page\n"),
    ):
        failed = run_script(REPORT, *flags, log=tmp_path / "log")
        assert (failed.returncode, failed.stderr) == (2, sentence)


# ------------------------------------------------------------------------------------------------------------- in a browser

SMALLEST_TEXT = """() => {
    const sizes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const owner = walker.currentNode.parentElement;
        if (walker.currentNode.data.trim() && owner.getClientRects().length) sizes.push(parseFloat(getComputedStyle(owner).fontSize));
    }
    return Math.min(...sizes);
}"""
LOWEST_CONTRAST = """() => {
    const linear = (c) => (c <= 0.04 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const luminance = (colour) => {
        const [red, green, blue] = colour.match(/[\\d.]+/g).map((channel) => linear(channel / 255));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const ground = (node) => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? ground(node.parentElement) : luminance(colour);
    };
    const contrasts = [...document.querySelectorAll("h1, h2, h3, p, td, th, figcaption, small, .plot span, li, summary")].map((node) => {
        const pair = [luminance(getComputedStyle(node).color), ground(node)];
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
    return Math.min(...contrasts);
}"""


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, without a network. Where CHROMIUM names it, as CI does, it must be there."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: install it, or name it as CHROMIUM=/path/to/chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in ("no-sandbox", *QUIET)])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it(browser, runs, tmp_path, width, scheme):
    """Nothing to complain of, nothing fetched, nothing too wide or too small or too faint; clips play; the pointer finds numbers."""
    long = tmp_path / ("a_name_of_a_run_that_says_all_its_flags" * 3)
    long.symlink_to(runs["pictures"])
    (tmp_path / "report.html").write_text(report(long, runs["clips"])[0], encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    messages, requests = [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    for opened in (False, True):
        if opened:
            tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate(SMALLEST_TEXT) >= 12
        assert tab.evaluate(LOWEST_CONTRAST) >= 4.5

    for video in tab.locator("video").all():
        video.scroll_into_view_if_needed()
        handle = video.element_handle()
        tab.wait_for_function("(video) => video.readyState >= 3 && !video.paused && video.currentTime > 0", arg=handle)
        assert handle.evaluate("(video) => [video.videoWidth, video.videoHeight]") == [32, 32]
        assert handle.evaluate("(video) => video.getBoundingClientRect().width") >= 120
    assert tab.locator("video").count() == 8
    assert all(side > 0 for side in tab.evaluate("[...document.images].map((image) => image.naturalWidth)"))

    plot = tab.locator('.plot[data-key="reward/aesthetic_mean"]')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    value = metrics(runs["pictures"])[1]["reward/aesthetic_mean"]
    assert plot.locator(".tip").inner_text().startswith(f"iteration 2\n{float(f'{value:.4g}')}, mean ")
    tip = plot.locator(".tip").bounding_box()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= width
    assert messages == [] and [url for url in requests if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    tab.close()
