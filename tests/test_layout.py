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

# low to high; a file imports from its own row and from lower ones. A name is a package, or one file of it
LAYERS = (
    {"errors", "counted", "suggest", "progress", "palette", "cache", "child", "charts"}
    | {"jit", "system", "registering", "webpage"},
    {"recipe", "families", "checkpoint"},
    {"planning", "artifact", "data"},
    {"moe", "gates", "backbone", "subject"},
    {"build", "gates.run", "backbone.run", "train", "audit", "evaluate", "export", "publish", "smaller", "after"},
    {"pipeline", "auto", "serve"},
    {"cli", "demo", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# independent of one another; all of them may use build, which makes artifacts
STAGES = LAYERS[4] - {"build"}
TORCH_FREE = {*LAYERS[0], *LAYERS[1], *LAYERS[2], "publish", "build.body"}
WITH_TORCH = {"publish.samples", "data.templates"}  # templates: transformers without torch, in a child process
NETWORK = {"huggingface_hub", "datasets", "requests", "httpx", "urllib", "socket"}
MAY_TOUCH_NETWORK = ("checkpoint/hub.py", "publish/", "serve/")


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


def module_of(file: Path) -> str:
    """src/frankenmoe/moe/block.py -> moe.block; the package's own file -> ''."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def room(module: str) -> str:
    """The longest name of the layers that holds a module: moe.block -> moe."""
    parts = module.split(".")
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in LEVEL)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_downwards() -> None:
    for file in FILES:
        own = module_of(file)
        for module in imports(file) if own else ():
            if not module.startswith("frankenmoe."):
                continue
            mine, other = room(own), room(module.removeprefix("frankenmoe."))
            assert LEVEL[other] <= LEVEL[mine], f"{own} imports {module}, which is above it"
            assert mine == other or not {mine, other} <= STAGES, f"stage {own} imports stage {module}"


def test_there_are_no_circles_among_files() -> None:
    edges = {
        ".".join(("frankenmoe", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): imports(file)
        for file in FILES
        if file != ROOT / "__init__.py"
    }

    TopologicalSorter(edges).prepare()  # CycleError names the files of a circle


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    assert [file for file in FILES if len(file.read_text().splitlines()) > MAX_LINES] == []


def test_every_file_has_a_docstring() -> None:
    assert [file for file in FILES if not ast.get_docstring(parsed(file))] == []


def test_only_the_command_line_prints_or_exits() -> None:
    for file in FILES:
        if name_of(file) == "cli":
            continue
        calls = [node.func for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not names & {"print", "exit", "quit"}, file
        assert "sys.exit" not in file.read_text(), file


def test_torch_and_the_network_stay_where_they_belong() -> None:
    for file in FILES:
        found = {module.split(".")[0] for module in imports(file)}
        if {name_of(file), module_of(file)} & TORCH_FREE and module_of(file) not in WITH_TORCH:
            assert not found & {"torch", "transformers"}, file
        if not str(file.relative_to(ROOT)).startswith(MAY_TOUCH_NETWORK):
            assert not found & NETWORK, file


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
