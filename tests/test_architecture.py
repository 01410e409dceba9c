"""Sizes, depths and arrows, read from the sources: `pytest -s tests/test_architecture.py` prints them."""

import ast
import itertools
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPTS = sorted(REPOSITORY.glob("train_grpo_*.py"))
BASELINES = sorted((REPOSITORY / "baselines").glob("*.py"))
LIBRARY = sorted((REPOSITORY / "fastvideo").rglob("*.py"))
ROOMS = ("", "parallel", "models", "embeddings", "rewards", "evaluation", "runs", "report")  # each imports from itself and those before it
BLOCKS = (ast.FunctionDef, ast.For, ast.While, ast.If, ast.With, ast.Try)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def lines(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def depth(node: ast.AST, elif_of: ast.AST | None = None) -> int:
    """Of blocks in each other, the function itself counted; an elif is as deep as its if."""
    deepest = max((depth(child, node) for child in ast.iter_child_nodes(node)), default=0)
    chained = isinstance(node, ast.If) and isinstance(elif_of, ast.If) and elif_of.orelse == [node]
    return deepest + (isinstance(node, BLOCKS) and not chained)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports, also inside functions: of the repository's `modules` as they are, else the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found |= {name if (name := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names}
    return {name if name in modules else name.partition(".")[0] for name in found}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


@pytest.mark.parametrize("script", SCRIPTS + BASELINES, ids=lambda path: path.name)
def test_a_script_is_short_and_flat(script):
    found = functions(script)
    longest = max(found.values(), key=lines)
    deepest = max(found.values(), key=depth)
    (loop,) = [node for node in found["main"].body if isinstance(node, ast.For)]
    print(
        f"{script.name}: {len(script.read_text().splitlines())} lines; longest function {longest.name}, {lines(longest)}; "
        f"deepest {deepest.name}, {depth(deepest)}; training loop {lines(loop)}"
    )
    assert len(script.read_text().splitlines()) <= 500
    assert lines(longest) <= 60
    assert depth(deepest) <= 4
    assert lines(loop) <= 60


def test_the_two_nearest_scripts_differ_in_few_lines():
    def changed(first: Path, second: Path) -> int:
        from test_docs import changed_lines

        return changed_lines(first.name, second.name)

    distances = {(one.name, other.name): changed(one, other) for one, other in itertools.combinations(SCRIPTS, 2)}
    nearest = min(distances, key=distances.get)
    print(f"nearest: {nearest}, {distances[nearest]} lines")
    assert distances[nearest] <= 100


def test_files_of_the_library_are_short():
    sizes = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in LIBRARY}
    for name in ROOMS:
        inside = [path for path in LIBRARY if room(module_name(path)) == name]
        deepest = max(depth(function) for path in inside for function in functions(path).values() or [ast.Pass()])
        print(f"fastvideo/{name}: {len(inside)} files, {sum(sizes[str(p.relative_to(REPOSITORY))] for p in inside)} lines, depth {deepest}")
    assert {file: size for file, size in sizes.items() if size > 250} == {}


def test_rooms_import_only_from_those_before_them():
    modules = {module_name(path): path for path in LIBRARY}
    graph = {module: imports(path, set(modules)) for module, path in modules.items()}
    wrong = [
        (module, other)
        for module, others in graph.items()
        for other in others
        if other in modules and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert wrong == []
    folders = {"baselines", "benchmarks", "examples", "preprocess", "scripts", "shapes", "tests"}
    outside = {path.stem for path in REPOSITORY.glob("*.py")} | folders
    assert [(module, other) for module, others in graph.items() for other in others & outside] == []


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path): path for path in LIBRARY}
    left = {
        module: {other for other in imports(path, set(modules)) if other in modules and other != module} for module, path in modules.items()
    }
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}, "each of these imports another one of these"


def test_every_room_says_what_lives_there():
    for name in ROOMS[1:]:
        said = ast.get_docstring(ast.parse((REPOSITORY / "fastvideo" / name / "__init__.py").read_text())) or ""
        assert 1 <= len(said.splitlines()) <= 4, name
