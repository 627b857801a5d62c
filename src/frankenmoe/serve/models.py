"""Opens and loads what is served, and gives each model its name."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from frankenmoe.evaluate.parents import stock_model
from frankenmoe.moe.device import place, resolve
from frankenmoe.moe.linear import prepare_kernels, to_int8
from frankenmoe.moe.load import MoE
from frankenmoe.progress import SILENT, Progress
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.gguf import Gguf
from frankenmoe.serve.refitting import Refitter, written
from frankenmoe.serve.running import Running
from frankenmoe.subject import Dense, kind_of, open_model, open_subject

Model = Running | Gguf


@dataclass(frozen=True)
class Loading:
    """How models are loaded: where, in which type, and whether caches and remote code may be used."""

    device: str = "auto"
    dtype: str | None = None
    int8: bool = False
    cache: bool = True
    trust_remote_code: bool = False
    most: int = 2048


@dataclass(frozen=True)
class Models:
    """The served models by name, in the order in which they were given."""

    by_name: Mapping[str, Model]
    created: int = field(default_factory=lambda: int(time.time()))

    def find(self, name: str) -> Model:
        """Raises RequestError for a name that is not served."""
        if name not in self.by_name:
            raise RequestError(
                f"there is no model {name!r}, expected one of {', '.join(self.by_name)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]

    def entry(self, name: str) -> dict[str, Any]:
        """A model as /v1/models lists it."""
        head = {"id": name, "object": "model", "created": self.created, "owned_by": "frankenmoe"}
        return head | {"frankenmoe": self.find(name).facts()}


def load_models(whats: Sequence[str | Path], *, how: Loading, progress: Progress = SILENT) -> Models:
    """Loads every model; the first is an MoE or a GGUF file. Raises the errors of opening and loading."""
    first = kind_of(whats[0])
    if first not in ("gguf", "dense"):
        open_subject(whats[0])  # a mistake in a recipe is reported before anything is loaded
    names: list[str] = []
    for what in whats:
        stem = (
            Path(os.path.abspath(what)).name if kind_of(what) in ("artifact", "mixture", "dense") else Path(what).stem
        )
        names.append(_free(stem, names))
    return Models({name: _load(what, how, progress) for name, what in zip(names, whats, strict=True)})


def _free(stem: str, taken: Sequence[str]) -> str:
    return next(
        name for count in range(1, len(taken) + 2) if (name := stem if count == 1 else f"{stem}-{count}") not in taken
    )


def _load(what: str | Path, how: Loading, progress: Progress) -> Model:
    if kind_of(what) == "gguf":
        return Gguf(Path(what), most=how.most)
    opened: Any = (
        open_model(what, cache=how.cache, trust_remote_code=how.trust_remote_code)
        if kind_of(what) == "dense"
        else open_subject(what, cache=how.cache, trust_remote_code=how.trust_remote_code)
    )
    if isinstance(opened, Dense):
        return Running(_dense(opened, how), most=how.most)
    moe = opened.load(dtype=how.dtype, device=how.device, int8=how.int8, progress=progress)
    prepare_kernels(moe.model, progress)
    refitter = Refitter.of(opened, device=how.device)
    return Running(moe, most=how.most, recipe=written(opened.recipe), refitter=refitter)


def _dense(opened: Dense, how: Loading) -> MoE:
    """A dense model as an MoE without experts."""
    dtype = getattr(torch, how.dtype) if how.dtype else None
    model = stock_model(opened.folder, dtype=dtype, trust_remote_code=opened.trust_remote_code)
    if how.int8:
        to_int8(model)
    return MoE(place(model, resolve(how.device)), (), opened.folder)
