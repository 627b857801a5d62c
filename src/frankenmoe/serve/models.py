"""Opens and loads what is served, and gives each model its name."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from frankenmoe.evaluate.parents import stock_model
from frankenmoe.export.llama import check_loadable
from frankenmoe.moe.device import place, resolve
from frankenmoe.moe.linear import prepare_kernels, to_int8
from frankenmoe.moe.load import MoE
from frankenmoe.planning.kind import kind_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.gguf import Gguf
from frankenmoe.serve.refitting import Refitter, written
from frankenmoe.serve.running import Running
from frankenmoe.subject import Dense, Subject, open_model, open_subject

Model = Running | Gguf


@dataclass(frozen=True)
class Loading:
    """How models are loaded: where, in which type, and whether caches and remote code may be used.

    `most` is the largest number of tokens of an answer. `experts_per_token` is for mixtures; None: as the model says.
    """

    device: str = "auto"
    dtype: str | None = None
    int8: bool = False
    cache: bool = True
    trust_remote_code: bool = False
    most: int = 2048
    experts_per_token: int | None = None


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


def load_models(
    whats: Sequence[str | Path],
    *,
    how: Loading,
    on_warnings: Callable[[Sequence[str]], None] = lambda warnings: None,
    progress: Progress = SILENT,
) -> Models:
    """Opens every model, tells the warnings of recipes' plans, then loads. Raises the errors of opening and loading."""
    opened = [_open(what, how) for what in whats]
    for each in opened:
        if isinstance(each, Subject) and each.artifact is None:
            on_warnings(each.planned.warnings)
    names: list[str] = []
    for what in whats:
        # abspath gives `.` and `..` the name of the folder
        path = Path(os.path.abspath(what))
        name = path.stem if path.is_file() else path.name
        names.append(_free(os.fsencode(name).decode(errors="replace"), names))  # a name on a disk may be no text
    return Models({name: _load(what, how, progress) for name, what in zip(names, opened, strict=True)})


def _open(what: str | Path, how: Loading) -> Subject | Dense | Path:
    if kind_of(what) == "gguf":
        check_loadable(Path(what))
        return Path(what)
    opened = open_subject if kind_of(what) == "mixture" else open_model
    return opened(
        what,
        cache=how.cache,
        trust_remote_code=how.trust_remote_code,
        experts_per_token=how.experts_per_token,
    )


def _free(stem: str, taken: Sequence[str]) -> str:
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _load(opened: Subject | Dense | Path, how: Loading, progress: Progress) -> Model:
    if isinstance(opened, Path):
        return Gguf(opened, most=how.most)
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
