"""The house rules that a machine can hold: who imports whom, how long a file is, who prints, what stays unimported."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "frankenmoe"
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400

# low to high; a file imports from its own package and from lower rows only
LAYERS = (
    {"errors", "suggest", "progress", "palette"},
    {"families", "checkpoint"},
    {
        "recipe",
        "recipefields",
        "recipestages",
        "recipetext",
        "recipetrain",
        "refusal",
        "sourcename",
        "yamlfile",
        "artifact",
    },
    {"planning", "data"},
    {"moe"},
    {"compose", "gates", "train", "audit", "evaluate", "export", "publish", "prove"},
    {"building"},
    {"loading", "fitting", "extracting"},
    {"auditing", "evaluating", "exporting", "training"},
    {"sampling"},
    {"running"},
    {"demo"},
    {"cli"},
)
STAGES = LAYERS[5]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = {"errors", "suggest", "progress", "families", "checkpoint", "recipe", "recipefields", "refusal"} | {
    "sourcename", "yamlfile", "artifact", "planning", "compose", "data", "palette", "recipestages",
    "recipetext", "recipetrain", "publish",
}  # fmt: skip
NETWORK = {"huggingface_hub", "datasets", "requests", "httpx", "urllib", "socket"}
MAY_TOUCH_NETWORK = ("checkpoint/hub.py", "publish/")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> frozenset[str]:
    """Every module a file names in an import, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(node.module or "")
    return frozenset(found)


def part(module: str) -> str:
    """frankenmoe.moe.block -> moe; the package itself -> ''."""
    return [*module.split("."), ""][1]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = name_of(file)
    if own == "__init__":
        return
    for module in imports(file):
        if not module.startswith("frankenmoe.") or part(module) == own:
            continue
        other = part(module)
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {module}, which is above it"
        assert not {own, other} <= STAGES - {"prove"}, f"stage {own} imports stage {other}: they meet on disk"


def test_there_are_no_circles_among_files() -> None:
    edges = {
        ".".join(("frankenmoe", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): imports(file)
        for file in FILES
        if file != ROOT / "__init__.py"
    }

    TopologicalSorter(edges).prepare()  # CycleError names the files of a circle


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_longer_than_four_hundred_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(parsed(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(file: Path) -> None:
    if name_of(file) == "cli":
        return
    calls = [node.func for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id in ("print", "exit", "quit")]
    assert "sys.exit" not in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_torch_and_the_network_stay_where_they_belong(file: Path) -> None:
    found = {module.split(".")[0] for module in imports(file)}
    if name_of(file) in TORCH_FREE:
        assert not found & {"torch", "transformers"}
    if not str(file.relative_to(ROOT)).startswith(MAY_TOUCH_NETWORK):
        assert not found & NETWORK


def test_pickle_is_never_imported() -> None:
    assert not [file for file in FILES if {"pickle", "dill", "joblib"} & set(imports(file))]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "recipes/raiden-16x3.43b.yml"]])
def test_plan_and_help_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['frankenmoe', *sys.argv[1:]]\n"
        "from frankenmoe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(3 if {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout
