"""The page: its sections in their order, and its tables."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastvideo.report import media
from fastvideo.report.charts import chart, colour
from fastvideo.report.read import RunFiles, markdown_blocks

POLICY = {
    "policy/ratio_max_dev": ("max |ratio - 1|", "Before an iteration's first update: 0 up to rounding."),
    "policy/clip_frac": ("Clip fraction", "Share of transitions whose ratio is outside the clip range."),
    "policy/approx_kl": ("Approximate KL", "Between the policy that sampled and the one that is updated."),
    "policy/kl": ("KL to the initial policy", "What --kl_weight weighs."),
    "policy/grad_norm": ("Gradient norm", "Before it is cut to --max_grad_norm."),
    "policy/lr": ("Learning rate", ""),
    "policy/loss": ("Loss", ""),
    "advantage/abs_mean": ("Mean |advantage|", ""),
    "reward/zero_std_frac": ("Groups that teach nothing", "Share of prompts whose samples all got the same rewards."),
}
COSTS = {
    "time/iteration_s": ("Seconds an iteration", ""),
    "throughput/samples_per_s": ("Samples a second", ""),
    "memory/peak_gib": ("Peak memory, GiB", "Of the fullest process."),
}
UNAVERAGED = "policy/lr", "memory/peak_gib"
HERE = Path(__file__).parent


def page(runs: list[RunFiles], window: int, clips: int) -> str:
    """The whole page as HTML; nothing in it asks for another file."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    rewards: dict[str, tuple[str, ...]] = {}  # as they are called -> the names of their means, in runs that train on them and in others
    for name in names:
        if name.startswith(("reward/", "held_out/")) and name.endswith("_mean"):
            title = name.partition("/")[2].removesuffix("_mean")
            rewards[title] = (*rewards.get(title, ()), name)
    known = {name for keys in rewards.values() for name in keys} | {*POLICY, *COSTS, "samples"}
    rest = {name: (name, "") for name in names if name not in known}
    data: dict[str, Any] = {}

    def charts(titles: dict[tuple[str, ...], tuple[str, str]]) -> str:
        figures = []
        for keys, (title, note) in titles.items():
            figure, data[keys[0]] = chart(keys, title, note, runs, 1 if keys[0] in UNAVERAGED else window)
            figures.append(figure)
        legend = f'<ul class="keys">{"".join(f"<li>{_name(run)}</li>" for run in runs)}</ul>' if len(runs) > 1 else ""
        return f'{legend}<div class="charts">{"".join(figures)}</div>'

    def those_of(titles: dict[str, tuple[str, str]]) -> str:
        return charts({(name,): text for name, text in titles.items() if name in names})

    reading = (
        f"Thin: each iteration. Thick: mean of the last {window}. Point at a curve for its numbers. "
        f"The table has means of the first and the last {window} iterations, or of the halves of a shorter run."
    )
    drawn = "Without noise in the steps."
    if any(len(run.samples()) > 1 for run in runs):
        drawn = "The same prompts and noise at the first and the last time that samples were drawn, without noise in the steps."
    curves = charts({keys: (title, _held_out(runs, keys)) for title, keys in rewards.items()})
    evaluations = [_markdown(run.evaluation()[0]) + media.evaluation(run, clips) for run in runs]
    sections = [
        _section("Rewards", reading, _rewards(runs, rewards, window) + curves),
        _section("Policy", "", those_of(POLICY)),
        _section("Time and memory", "", _time(runs) + those_of(COSTS)),
        _of_each("Samples", drawn, runs, [media.samples(run, clips) for run in runs]),
        _of_each("Evaluation", "", runs, evaluations),
        _section("Arguments that differ", "", _differences(runs)) if len(runs) > 1 else "",
        _section("Manifests", "", "".join(_manifest(run) for run in runs)),
        _section("All other metrics", "", f"<details><summary>{len(rest)} curves</summary>{those_of(rest)}</details>") if rest else "",
    ]
    body = f"<h1>Training report</h1>{_overview(runs)}{''.join(sections)}"
    data = {"runs": [run.name for run in runs], "colours": [colour(run.number) for run in runs], "charts": data}
    return _document(", ".join(run.name for run in runs), body, data)


def _document(title: str, body: str, data: dict[str, Any]) -> str:
    """data: what the script reads."""
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    shown = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{(HERE / 'page.css').read_text()}</style></head><body>{body}"
        f'<script type="application/json" id="data">{shown}</script><script>{(HERE / "page.js").read_text()}</script></body></html>\n'
    )


def _held_out(runs: list[RunFiles], keys: tuple[str, ...]) -> str:
    """Which runs have not been trained on a reward."""
    names = [run.name for run in runs if any(key in run.metrics() for key in keys if key.startswith("held_out/"))]
    return "" if not names else "Held out." if len(runs) == 1 else f"Held out in the run{'s' * (len(names) > 1)} {', '.join(names)}."


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{note}</p>' if note else ''}{body}</section>"


def _of_each(title: str, note: str, runs: list[RunFiles], bodies: list[str]) -> str:
    """A section with what each run has to show; none if no run has anything."""
    parts = [f"<h3>{_name(run)}</h3>{body}" for run, body in zip(runs, bodies, strict=True) if body]
    return _section(title, note, "".join(parts)) if parts else ""


def _name(run: RunFiles) -> str:
    return f'<span class="key {colour(run.number)}"></span>{escape(run.name)}'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = [("th", head), *(("td", row) for row in rows)]
    body = "".join(f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>" for tag, cells in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def _overview(runs: list[RunFiles]) -> str:
    rows = []
    for run in runs:
        done, of = run.rows[-1]["iteration"], run.arguments.get("iterations")
        state = f"{done} of {of}" if of else f"{done}"
        state += ", exported" if (run.folder / "export").is_dir() else ", not at its end" if of and done < of else ""
        seconds = float(np.nansum(run.series("time/iteration_s")[1]))
        where = f"{run.manifest['world_size']} x {run.manifest['device']}" if {"world_size", "device"} <= run.manifest.keys() else "?"
        samples = f"{run.rows[-1]['samples']:,}" if "samples" in run.rows[-1] else "?"
        facts = (run.manifest.get("script", "?"), state, samples, _duration(seconds), where)
        rows.append([_name(run), *(escape(str(fact)) for fact in facts)])
    return _table(["run", "script", "iterations", "samples drawn", "time in iterations", "processes"], rows)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if minutes < 100 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def _rewards(runs: list[RunFiles], rewards: dict[str, tuple[str, ...]], window: int) -> str:
    """Means of the first and the last `window` iterations of each run, or of its halves."""
    rows = []
    for title, keys in rewards.items():
        for run in runs:
            values = run.series(*keys)[1]
            if values.size:
                count = min(window, -(-values.size // 2))
                first, last = float(values[:count].mean()), float(values[-count:].mean())
                named = [_name(run)] if len(runs) > 1 else []
                held_out = " (held out)" if _held_out([run], keys) else ""
                rows.append([escape(title + held_out), *named, f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"])
    return _table(["reward", *(["run"] if len(runs) > 1 else []), "at the start", "at the end", "change"], rows)


def _time(runs: list[RunFiles]) -> str:
    """A bar a run: its phases' shares of the mean iteration."""
    parts = []
    for run in runs:
        seconds = {key[5:-2]: float(np.nanmean(run.series(key)[1])) for key in run.metrics() if key.startswith("time/")}
        whole = seconds.pop("iteration", sum(seconds.values()))
        seconds["other"] = max(0.0, whole - sum(seconds.values()))
        shares = {name: 100 * part / whole for name, part in seconds.items()} if whole > 0 else {}
        paint = [f"opacity:{max(0.15, 1 - 0.2 * i):.2g}" for i in range(len(shares))]
        bar = "".join(f'<i style="width:{share:.2f}%;{shade}"></i>' for share, shade in zip(shares.values(), paint))
        keys = "".join(
            f'<li><span class="key" style="{shade}"></span>{escape(name)} {seconds[name]:.3g} s, {share:.0f} %</li>'
            for (name, share), shade in zip(shares.items(), paint)
        )
        title = f"<h3>{_name(run)}</h3>" if len(runs) > 1 else ""
        split = f'<div class="bar">{bar}</div><ul class="keys">{keys}</ul>'
        parts.append(f'{title}<div class="{colour(run.number)}"><p>A mean iteration takes {whole:.3g} s:</p>{split}</div>')
    return "".join(parts)


def _markdown(text: str) -> str:
    parts = []
    for kind, block in markdown_blocks(text):
        if kind == "table":
            parts.append(_table([escape(cell) for cell in block[0]], ([escape(cell) for cell in row] for row in block[1:])))
        elif block != "Evaluation":
            parts.append(f"<h4>{escape(block)}</h4>" if kind == "heading" else f"<p>{escape(block)}</p>")
    return "".join(parts)


def _facts(run: RunFiles) -> dict[str, Any]:
    """What a manifest says, flat; without what differs in any case."""
    facts = {f"--{name}": value for name, value in run.arguments.items() if name != "output_dir"}
    facts |= {f"{name} (package)": value for name, value in run.manifest.get("packages", {}).items()}
    return facts | {name: run.manifest.get(name) for name in ("script", "git", "world_size", "device", "embeddings_digest")}


def _differences(runs: list[RunFiles]) -> str:
    facts = [_facts(run) for run in runs if run.manifest]
    names = dict.fromkeys(name for part in facts for name in part)
    rows = [[_code(name), *(_value(part[name]) if name in part else "" for part in facts)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return _table(["", *(_name(run) for run in runs if run.manifest)], rows) if rows else "<p>None.</p>"


def _manifest(run: RunFiles) -> str:
    if not run.manifest:
        return f"<p>{_name(run)} has no manifest.json.</p>"
    simple = {name: value for name, value in run.manifest.items() if name not in ("arguments", "packages", "history", "source", "command")}
    tables = [
        _table(["argument", "value"], ([_code(f"--{name}"), _value(value)] for name, value in run.arguments.items())),
        _table(["package", "version"], ([_code(name), _value(value)] for name, value in run.manifest.get("packages", {}).items())),
        _table(["fact", "value"], ([_code(name), _value(value)] for name, value in simple.items())),
    ]
    history = [
        [
            _value(start.get("started")),
            "<br>".join(f"{_code(name)} {_value(start[name])}" for name in start if name not in ("started", "source")),
        ]
        for start in run.manifest.get("history", [])
    ]
    starts = _table(["earlier start", "what was not the same then"], history) if history else "<p>Started once.</p>"
    command = f"<pre>{escape(' '.join(map(str, run.manifest.get('command', []))))}</pre>"
    body = f'{command}<div class="columns">{"".join(tables)}{starts}</div>'
    return f"<details><summary>{_name(run)}</summary>{body}</details>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _value(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
