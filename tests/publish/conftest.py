"""A small artifact with its sources, made once, and copies of it to write into."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehub import TOKEN, Hub, running
from huggingface_hub import constants

import tiny
from frankenmoe.artifact.folder import Artifact, open_artifact
from frankenmoe.build.run import build

PERMISSIVE = (
    "---\nlicense: apache-2.0\nlanguage: en\ndatasets:\n- togethercomputer/RedPajama-Data-1T\n---\n\n# Parent\n"
)


@pytest.fixture(scope="session")
def made(parents: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three parents that declare a licence, a recipe, and its built and virtual artifacts."""
    root = tmp_path_factory.mktemp("publish")
    own = [root / "parents" / name for name in ("base", "maths", "verse")]
    for folder, source in zip(own, parents["llama"], strict=True):
        shutil.copytree(source, folder)
        (folder / "README.md").write_text(PERMISSIVE)
    recipe = tiny.write_recipe(
        root / "recipe.yml", Path("parents/base"), [Path("parents/maths"), Path("parents/verse")], name="Two-of-them",
        prompts=True, gate_mode="hidden",
    )  # fmt: skip
    build(recipe, root / "moe")
    build(recipe, root / "virtual", virtual=True)
    return root


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Artifact:
    """The built artifact, to write into; its sources stay where they are."""
    shutil.copytree(made / "moe", tmp_path / "moe")
    return open_artifact(tmp_path / "moe")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub()) as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        template = f"{state.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state
