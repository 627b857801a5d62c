"""A server over small models, which most tests of this folder ask."""

from collections.abc import Iterator

import pytest

from frankenmoe.export.run import export_gguf
from serving import Server, make_models, start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the recipe `moe`, beside it its base `llama0` and its GGUF file `moe-F32`."""
    folder = tmp_path_factory.mktemp("served")
    make_models(folder)
    (file,) = export_gguf(folder / "moe.yml", folder, types=["f32"], allow_random=True)
    running = start(folder, "--beside", "llama0", "--beside", str(file.path.name), "--max-tokens", "16000")
    yield running
    said = running.end()
    assert "Traceback" not in said
