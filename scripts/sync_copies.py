"""Keeps what the training scripts copy from each other equal: `python scripts/sync_copies.py` says which functions and classes differ.

The scripts are train_grpo_*.py and baselines/*.py. What is meant to be a copy has a comment above it (above its decorators):

    # Copied from train_grpo_flux.py
    # Copied from train_grpo_flux.py with transformer->unet, args.shift->args.model

Under the banner of a section the comment is for the whole section, and above the first banner for the whole script. Change a function in
the named script, then run `python scripts/sync_copies.py --write` to carry the change to every copy. To let a copy go its own way, delete
the comment; in a section or script that has one, write `# Own` above the function.
"""

import ast
import functools
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BANNER = re.compile(r"^# \d\. [\w ]+ =+$")
MARKER = re.compile(r"^# Copied from (?P<script>\w+\.py)(?: with (?P<renames>.+))?$")


@functools.cache
def functions(source: str) -> dict[str, tuple[int, int]]:
    """Name -> first line (of the decorators) and last line, counted from 1, of each function and class at the top level of a script."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno) for node in nodes}


def markers(lines: list[str], places: dict[str, tuple[int, int]]) -> dict[str, re.Match]:
    """Of each function that is meant to be a copy, the comment that says so: its own, or its section's, or its script's."""
    banners = {number: MARKER.match(lines[number + 1]) for number, line in enumerate(lines[:-1]) if BANNER.match(line)}
    whole = next((marker for line in lines[: min(banners, default=0)] if (marker := MARKER.match(line))), None)
    found = {}
    for name, (first, _) in places.items():
        section = max((number for number in banners if number < first), default=None)
        marker = MARKER.match(lines[first - 2]) or (banners.get(section) or whole if lines[first - 2] != "# Own" else None)
        if marker:
            found[name] = marker
    return found


def stale_copies(folder: Path = REPOSITORY, write: bool = False) -> list[str]:
    """What is wrong with the copies in `folder`'s training scripts, a sentence each; with `write`, stale ones are replaced instead.

    Two functions are equal if their syntax trees are, docstrings included, after the marker's renames in the original.
    """
    problems = []
    for path in [*sorted(folder.glob("train_grpo_*.py")), *sorted(folder.glob("baselines/*.py"))]:  # which copy from the former
        script = path.relative_to(folder)
        lines = path.read_text().splitlines()
        places = functions(path.read_text())
        marked = markers(lines, places)
        for name in sorted(marked, key=lambda name: -places[name][1]):  # from the end, so that line numbers stay true
            (first, last), marker = places[name], marked[name]
            original = (folder / marker["script"]).read_text()
            if name not in functions(original):
                problems.append(f"{script}: {name} is marked as a copy, but {marker['script']} has no such function")
                continue
            start, end = functions(original)[name]
            wanted = "\n".join(original.splitlines()[start - 1 : end])
            for rename in (marker["renames"] or "").split(", ") if marker["renames"] else []:
                wanted = wanted.replace(*rename.split("->"))
            if ast.dump(ast.parse(wanted)) == ast.dump(ast.parse("\n".join(lines[first - 1 : last]))):
                continue
            problems.append(f"{script}: {name} differs from the one in {marker['script']}")
            lines[first - 1 : last] = wanted.splitlines()
        if write:
            path.write_text("\n".join(lines) + "\n")
    return problems


if __name__ == "__main__":
    write = sys.argv[1:] == ["--write"]
    problems = stale_copies(write=write)
    print("\n".join(problems + ["rewritten"] * (write and bool(problems))) or "all copies are equal")
    sys.exit(bool(problems) and not write)
