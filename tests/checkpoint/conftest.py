"""Checkpoints for the tests, written by the reference library and never by ours."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import TensorRef

Save = Callable[..., dict[str, TensorRef]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save tensors under a file name and give their refs."""

    def save_tensors(tensors: Mapping[str, torch.Tensor], *, file: str = "source.safetensors") -> dict[str, TensorRef]:
        save_file(dict(tensors), tmp_path / file, metadata={"format": "pt"})
        return read_header(tmp_path / file)

    return save_tensors
