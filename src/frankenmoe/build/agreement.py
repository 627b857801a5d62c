"""Whether transformers agrees with a target: it loads the sources, its class has the tensors, it splits text alike.

Imports torch and transformers, which takes seconds; build/asking.py remembers the answer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from frankenmoe.build.target import Target
from frankenmoe.build.tokens import tokenizer_files
from frankenmoe.errors import ArtifactError
from frankenmoe.families import FORMATS
from frankenmoe.moe.dense import causal_class, one_line, quiet_transformers, torch_dtype
from frankenmoe.moe.load import check_loadable

UNKNOWN_CLASS = "the installed transformers has a new layout for this format; update frankenmoe"
# model types whose stacked experts are stored turned; the class takes them both ways, and would save them as they are
TURNED = frozenset(fmt.model_type for fmt in FORMATS.values() if fmt.turned)
EXPERT_AXES = 3
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def agree(target: Target) -> dict[str, bytes]:
    """Checks a target. Returns the tokenizer files of a built folder that must differ from the base's.

    Raises SourceError for a source that transformers cannot load, ArtifactError if it has other tensors or splits text
    otherwise.
    """
    check_loadable(target.sources, base=target.base, trust_remote_code=target.trust_remote_code)
    if target.config is None:
        return {}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(target.config), encoding="utf-8")
        compare_class(Path(folder), target.tensors, where="the plan", hint=UNKNOWN_CLASS)
    return tokenizer_files(target)


def compare_class(folder: Path, tensors: Tensors, *, where: str, hint: str) -> str:
    """Checks that `tensors` are exactly those that the model class of the folder's config would save.

    Returns what was found, in words.
    """
    with torch.device("meta"), quiet_transformers():
        model = _stock_model(folder, where=where)
        state = revert_weight_conversion(model, model.state_dict())
    config = model.config
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    ours = {name: (torch_dtype(dtype), shape) for name, (dtype, shape) in tensors.items()}
    turns = config.model_type in TURNED
    theirs = {
        name: (
            ours[name][0] if _widened(tensor, ours.get(name)) else tensor.dtype,
            tuple(tensor.mT.shape if turns and tensor.dim() == EXPERT_AXES else tensor.shape),
        )
        for name, tensor in state.items()
    }
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ArtifactError(
                f"{type(model).__name__} and {where} disagree on {name}: the class has "
                f"{_spell(theirs.get(name))}, {where} {_spell(ours.get(name))}",
                hint=hint,
            )
    return f"{type(model).__name__} has exactly these {len(state)} tensors"


def _stock_model(folder: Path, *, where: str) -> Any:
    """The model of a folder's config. ArtifactError if transformers takes no such config."""
    try:
        config = AutoConfig.from_pretrained(folder)
        return _stock_class(config)._from_config(config, dtype=config.dtype)
    except Exception as error:  # its validators and models have errors of many classes
        raise ArtifactError(
            f"transformers cannot make a model from the config of {where}: {type(error).__name__} {one_line(error)}",
            hint="check config.json of base_model: its settings are copied",
        ) from error


def _stock_class(config: Any) -> Any:
    """The class of a config that a plan has made: the one that the config names."""
    found = getattr(transformers, (config.architectures or [""])[0], None)
    return causal_class(config) if found is None else found


def _widened(tensor: torch.Tensor, ours: tuple[torch.dtype, tuple[int, ...]] | None) -> bool:
    """Whether a class keeps in float32 what is stored with fewer bits, such as a router; it loads that as it is."""
    return ours is not None and tensor.dtype == torch.float32 and ours[0].is_floating_point


def _spell(found: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if found is None else f"{found[0]} {list(found[1])}"
