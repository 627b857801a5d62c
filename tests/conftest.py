"""Fixtures that several folders of tests share."""

import os

# one thread each: two workers with two threads each wait for one another far longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:
    # one cache for this run and all its workers; compiled products and vLLM's environment stay in the user's own
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmoe"
    CACHE = Path(tempfile.mkdtemp(prefix="frankenmoe-tests-"))
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    (CACHE / "frankenmoe").mkdir()
    for kind in ("kernels", "vllm"):
        (users / kind).mkdir(parents=True, exist_ok=True)
        (CACHE / "frankenmoe" / kind).symlink_to(users / kind)

import pytest

import tiny

SHARED = Path(__file__).parents[2] / "shared"


def pytest_unconfigure() -> None:
    """Removes the cache of this run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one would leave the other worker with nothing to do."""
    longest = ("test_docs.py", "test_whole.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Family -> a base and two fine-tunes (folders), made once."""
    root = tmp_path_factory.mktemp("parents")
    return {
        family: [tiny.make_parent(root / family / str(seed), family, seed=seed) for seed in range(3)]
        for family in (*tiny.FAMILIES, tiny.UNLISTED)
    }


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The real-text parents that live beside the checkout, where they do."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: real-text parents are not part of the project")
    return folder
