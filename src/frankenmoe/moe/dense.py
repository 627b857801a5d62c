"""Loads dense transformers models from mapped tensors, and finds their `mlp` modules."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.tensors import DTYPES, TensorWrite
from frankenmoe.checkpoint.values import materialize
from frankenmoe.counted import counted
from frankenmoe.errors import SourceError
from frankenmoe.families import FAMILIES, MLPS, text_config, wrapper_of
from frankenmoe.moe.counting import counting
from frankenmoe.moe.linear import is_linear, keep_stored
from frankenmoe.planning.sources import Source, anatomy
from frankenmoe.planning.tree import dense_writes

WRONG_CONFIG = "check that config.json was saved with these weights"
LONGEST = 200  # characters that are quoted of another library's message
# oneDNN, which multiplies 16-bit matrices on CPUs, keeps compiled code for 1,024 shapes, nearly 1 MB each. Experts read
# another number of tokens in every batch, so it would keep them all. It reads this variable at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
IN_LAYER = re.compile(r"(?:^|.*\.)(?P<layer>\d+)\.(?P<part>\w+)$")


def as_tensor(write: TensorWrite) -> torch.Tensor:
    """A write as a torch tensor. A plain copy is a view of the source's mapped pages."""
    raw = torch.from_numpy(materialize(write))
    return raw.view(torch_dtype(write.dtype)).view(write.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors type such as BF16."""
    found = getattr(torch, DTYPES[name].name)
    assert isinstance(found, torch.dtype)
    return found


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder's language model. SourceError if this transformers version cannot read it."""
    try:
        whole = read_object(folder / "config.json", hint=WRONG_CONFIG)
        if wrapper_of(whole):
            return AutoConfig.for_model(**text_config(whole), name_or_path=str(folder))
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # its validators have classes of their own
        raise SourceError(
            f"transformers {transformers.__version__} cannot read {folder / 'config.json'}: {one_line(error)}",
            hint="update transformers; if the model needs its own code and you trust it, use --trust-remote-code",
        ) from error


def source_config(source: Source) -> Any:
    """The transformers config of a source as a dense model. SourceError if this transformers version cannot read it."""
    if source.part is None:
        return read_config(source.folder, trust_remote_code=source.trust_remote_code)
    return made_config(source.config)


def made_config(config: Mapping[str, Any]) -> Any:
    """A transformers config from the content of a config.json."""
    return AutoConfig.for_model(**{key: _decoded(value) for key, value in config.items() if key != "architectures"})


def _decoded(value: Any) -> Any:
    """A config value with infinities in place of the mappings that transformers writes for them in JSON."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, without remote code. SourceError if it cannot be loaded, or cannot split text."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer("a text")  # only now are some settings used, such as the longest length
            return tokenizer
    except Exception as error:  # tokenizers raises a plain Exception if it cannot parse a file
        raise SourceError(
            f"{folder} has no tokenizer that transformers can load: {one_line(error)}",
            hint="put the tokenizer's files next to the base's weights, or fetch them again",
        ) from error


def load_dense(config: Any, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> PreTrainedModel:
    """A dense causal language model whose parameters are the given tensors, without copies.

    `from_pretrained` handles tied weights, buffers and renamed keys. Raises SourceError if a parameter has no tensor;
    transformers would initialise it at random.
    """
    cls = causal_class(config)
    with quiet_transformers(), _explained(cls, config):
        model, report = cls.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
        )
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        raise SourceError(
            f"the source has no tensor for {counted(len(lost), 'parameter')} of {cls.__name__}, the first is {lost[0]}",
            hint="config.json and the weights belong to different models",
        )
    return counting(cast(PreTrainedModel, keep_stored(model.eval())))


def load_source(source: Source, *, stored: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A source as a dense model with its adapter merged. Merged weights are rounded to `stored`, then to `dtype`."""
    config = source_config(source)
    if source.own_rows is not None:  # the base's embeddings stand in for its own
        config.vocab_size = source.config["vocab_size"]
        config.tie_word_embeddings = source.config.get("tie_word_embeddings", config.tie_word_embeddings)
    tensors = {write.name: as_tensor(write) for write in dense_writes(source, anatomy(source), dtype=stored)}
    return load_dense(config, tensors, dtype=dtype or torch_dtype(stored))


def causal_class(config: Any) -> Any:
    """The causal language model class of a config. A remote class only if the config itself came from remote code."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own and type(config).__module__.startswith("transformers_modules."):
        return get_class_from_dynamic_module(own, config._name_or_path)
    raise SourceError(
        f"transformers has no causal language model for {config.model_type!r}",
        hint="frankenmoe needs decoders that AutoModelForCausalLM can load",
    )


def mlp_modules(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Layer -> (the layer, its `mlp`) of a transformers decoder.

    SourceError if an `mlp` takes more than hidden states. Bloom's, for example, adds the residual itself.
    """
    config: Any = model.config
    family = FAMILIES.get(config.model_type)
    some = None if family is None or family.in_every_layer else family.layered(config.to_dict())
    found = {layer: pair for layer, pair in _named_parts(model).items() if some is None or layer in some}
    for _, mlp in found.values():
        wanted = [key for key, value in signature(mlp.forward).parameters.items() if value.default is Parameter.empty]
        if len(wanted) > 1:
            raise SourceError(
                f"the `mlp` of {type(model).__name__} takes {' and '.join(wanted)}, expected only hidden states",
                hint="an expert's `mlp` must map hidden states to hidden states; use another model",
            )
    return found


def layer_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> the layer of a transformers decoder, also where it has no FFN."""
    return {layer: holder for layer, (holder, _) in _named_parts(model).items()}


def _named_parts(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Layer -> (the layer, its module that is called as FFNs are)."""
    config: Any = model.config
    family = FAMILIES.get(config.model_type)
    names, found = MLPS if family is None else (family.mlp,), {}
    for name, module in model.named_modules():
        match = IN_LAYER.match(name)
        if match and match["part"] in names:
            found[int(match["layer"])] = (model.get_submodule(name.rpartition(".")[0]), module)
    return dict(sorted(found.items()))


def skeleton(config: Any) -> dict[int, nn.Module]:
    """Layer -> the `mlp` of this config's model, with parameters on the meta device."""
    return {layer: mlp for layer, (_, mlp) in mlp_modules(_meta_model(config)).items()}


def linear_names(config: Any) -> set[str]:
    """Names of the linear layers of this config's model, without a head that is tied to the embeddings."""
    model = _meta_model(config)
    embeddings = model.get_input_embeddings().weight
    return {name for name, module in model.named_modules() if is_linear(module) and module.weight is not embeddings}


def _meta_model(config: Any) -> Any:
    cls = causal_class(config)
    with torch.device("meta"), quiet_transformers(), _explained(cls, config):
        return cls._from_config(config)


def fill(pattern: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of an `mlp` whose parameters are the given tensors, by name within the `mlp`."""
    # with this memo, deepcopy shares the pattern's parameters and does not copy them; they are replaced below
    module = copy.deepcopy(pattern, {id(tensor): tensor for tensor in (*pattern.parameters(), *pattern.buffers())})
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise SourceError(
            f"the FFN tensors {', '.join(tensors)} do not fit {type(pattern).__name__}: {one_line(error)}",
            hint="this family stores its FFN under other names than its module uses, which is not supported yet",
        ) from error
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return keep_stored(module.eval())


@contextmanager
def _explained(cls: Any, config: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a model's code may raise anything for an invalid config
        where = Path(config._name_or_path) / "config.json" if config._name_or_path else "this config"
        raise SourceError(
            f"transformers cannot make a {cls.__name__} from {where}: {type(error).__name__} {one_line(error)}",
            hint=WRONG_CONFIG,
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and reports."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """An error's message on one line, at most LONGEST characters of it."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
