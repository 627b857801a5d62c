"""Documents are true: their commands and programs run, their recipes parse, their links and options exist."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import frankenmoe as fm
from frankenmoe.cli.app import app
from frankenmoe.demo import kits, parents, run
from frankenmoe.demo.text import held_out
from frankenmoe.recipe import IGNORED_KEYS, schema
from refusals import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *PAGES, *ROOT.glob("benchmarks/*.md")]
SHORT = 12_000  # characters of a text
SETS_UP = ("make ", "python3 -m venv", ".venv/bin/")  # these make the environment that this test runs in
# the two headings are all that any model prints alike: what it says depends on its training, which is shorter here
SAME_IN_EVERY_CHAT = ("experts: ", "token ")


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page: `kind` is the word after the fence."""

    kind: str
    text: str


def blocks(text: str, *kinds: str) -> list[Block]:
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", text, flags=re.S | re.M)
    return [Block(kind, textwrap.dedent(text)) for _, kind, text in found if kind in kinds]


def runs_something(page: Path) -> bool:
    return bool(blocks(page.read_text(), "sh", "console", "python"))


def follow(text: str, folder: Path) -> None:
    """Does in `folder` what a page tells its reader to do, in order, and compares what is printed where it is shown."""
    for block in blocks(text, "sh", "console", "python"):
        if block.kind == "python":
            python(block.text, folder)
        elif block.kind == "console":
            command, _, shown = block.text.removeprefix("$ ").partition("\n")
            check_shown(command, shown, printed=frankenmoe(command, folder))
        else:
            shell(block.text, folder)


def shell(text: str, folder: Path) -> None:
    """Runs the lines of a `sh` block; `cat > FILE <<'EOF'` writes the file."""
    lines = iter(text.replace("\\\n", "").splitlines())
    for line in lines:
        heredoc = re.fullmatch(r"cat > (\S+) <<'EOF'", line)
        if heredoc:
            (folder / heredoc[1]).write_text("\n".join(iter(lambda: next(lines), "EOF")) + "\n")
        elif not line.startswith(SETS_UP) and line != "frankenmoe demo":  # which has run already
            assert frankenmoe(line, folder), line


def frankenmoe(command: str, folder: Path) -> str:
    """What a command prints that must succeed."""
    program, *arguments = shlex.split(command)
    assert program == "frankenmoe", command
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = cli(*arguments)
    assert outcome.code == 0, f"{command}\n{outcome.stderr}"
    return outcome.stdout


def python(program: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(program, "program", "exec"), {})


def check_shown(command: str, shown: str, *, printed: str) -> None:
    """`...` in what a page shows stands for anything; spaces at the ends of lines do not count."""
    if command.startswith("frankenmoe chat"):
        shown = "\n...\n".join(line for line in shown.splitlines() if line.startswith(SAME_IN_EVERY_CHAT))
    expected = ".*?".join(re.escape(part.strip()) for part in shown.split("..."))
    plain = "\n".join(line.rstrip() for line in printed.splitlines())
    assert re.search(expected, plain, flags=re.S), f"{command}\nshown:\n{shown}\nprinted:\n{plain}"


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """What `frankenmoe demo` makes first: parents, here with hardly any training, and texts."""
    settings = replace(parents.DEFAULTS, base_steps=20, expert_steps=10, rows=4)
    parents.make_parents(tmp_path / "demo-out" / "parents", settings=settings)
    run.write_texts(tmp_path / "demo-out" / "text")
    return with_short_texts(tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `frankenmoe demo` has run with a quarter of its text."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        smaller = replace(parents.DEFAULTS, rows=parents.DEFAULTS.rows // 4)
        patch.setattr(kits, "make_parents", partial(parents.make_parents, settings=smaller))
        patch.setattr(kits, "TOY", replace(kits.TOY, train_steps=20))
        for name, value in (("TEXT_CHARACTERS", 10_000), ("FIT_TOKENS", 1024)):
            patch.setattr(run, name, value)
        patch.setattr(run, "held_out", lambda domain: shortened(held_out(domain), SHORT // 2))
        check_story(json.loads(frankenmoe("frankenmoe demo --json", folder)))
    return with_short_texts(folder)


@pytest.fixture
def workplace(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo's folder with the ready recipes, so that pages do not meet."""
    folder = tmp_path / "work"
    shutil.copytree(demo, folder, symlinks=True)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def with_short_texts(folder: Path) -> Path:
    """Many commands fit routers; the demo has shown what more text gives, here less will do."""
    for file in (folder / "demo-out" / "text").glob("*.txt"):
        file.write_text(shortened(file.read_text(), SHORT // 2 if "heldout" in file.name else SHORT))
    return folder


def shortened(text: str, characters: int) -> str:
    kept = text[:characters]
    return kept[: kept.rindex("\n") + 1]


def check_story(story: dict[str, Any]) -> None:
    loss = {name: row["mean"] for name, row in story["held_out_loss"].items()}
    assert loss["MoE, own expert forced"] < loss["MoE, prompt gates"] < loss["MoE, random gates"]
    assert loss["MoE, prompt gates"] < loss["dense base"]
    assert story["largest_logit_difference_to_stock_transformers"] < 1e-4


@pytest.mark.timeout(600)
def test_the_first_screen_of_the_readme_can_be_followed(untrained: Path) -> None:
    first, _, _ = README.read_text().partition("\n## ")
    follow(first, untrained)
    assert (untrained / "my-moe" / "frankenmoe.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_readme_can_be_followed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow(README.read_text(), workplace)
    printed = capsys.readouterr().out
    assert "4 experts" in printed
    assert "tensor(" in printed
    assert (workplace / "from-python" / "frankenmoe.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", [page for page in PAGES if runs_something(page)], ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, workplace: Path) -> None:
    follow(page.read_text(), workplace)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_at_its_own_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frankenmoe.cli", "demo", "--json"]
    story = json.loads(subprocess.check_output(command, cwd=tmp_path))
    check_story(story)
    for name, row in story["held_out_loss"].items():
        shown = re.search(rf"^\| {re.escape(name)}.*$", README.read_text(), flags=re.M)
        if shown:
            numbers = [float(number) for number in re.findall(r"\d\.\d{3}", shown[0])]
            assert numbers == pytest.approx(list(row.values()), abs=0.03), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_in_pages_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(), "yaml"):
        experts = [{"source_model": name, "positive_prompts": [name]} for name in ("maths", "verse")]
        recipe = {"base_model": "base", "experts": experts} | yaml.safe_load(block.text)
        fm.Recipe.parse(yaml.safe_dump(recipe), folder=tmp_path, origin=page.name)


def test_the_reference_is_what_the_program_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert (ROOT / "docs" / "reference.md").read_text() == made, "run `make reference`"


def test_the_recipe_page_names_every_key() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    keys = set(schema()["properties"]) | set(schema()["$defs"]["Expert"]["properties"])
    stages = {
        key for name in ("Build", "Fit", "Audit", "Eval", "Export", "Card") for key in settings_of(f"{name}Settings")
    }
    assert sorted(key for key in (keys | stages) - set(IGNORED_KEYS) if f"`{key}`" not in page) == []


def test_the_training_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert sorted(key for key in settings_of("TrainSettings") if f"`{key}`" not in page) == []


def settings_of(section: str) -> set[str]:
    return set(schema()["$defs"][section]["properties"])


def test_the_readme_names_every_command() -> None:
    assert sorted(name for name in app.commands if f"`{name}`" not in README.read_text()) == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_options_in_documents_exist(page: Path) -> None:
    """Blocks marked `text` are commands of other programs, or those that need a network or several GPUs."""
    known = {option for command in app.commands.values() for each in command.params for option in spellings(each)}
    text = re.sub(r"^```text\n.*?^```$", "", page.read_text(), flags=re.S | re.M)
    named = {
        option for code in re.findall(r"`[^`]+`", text) for option in re.findall(r"(?<!\S)--[a-z][a-z0-9_-]*", code)
    }
    others = {"--multi_gpu", "--num_processes", "--scale"}  # accelerate's and the benchmarks'
    assert sorted(named - known - others) == []


def spellings(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def test_links_between_documents_lead_somewhere() -> None:
    for page in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            if target.startswith("http"):
                continue
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_ready_recipes_are_yaml_that_the_schema_knows() -> None:
    for file in ROOT.glob("recipes/*.yml"):
        assert set(yaml.safe_load(file.read_text())) <= set(schema()["properties"])


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed: pip install '.[docs]'")
def test_the_pages_build_as_a_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "quickstart.html").is_file()
