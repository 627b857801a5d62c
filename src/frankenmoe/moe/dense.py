"""Dense transformers models over mapped tensors, and the `mlp` modules in them; knows nothing of experts or routers."""

import copy
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

from frankenmoe.checkpoint.tensors import DTYPES, TensorWrite
from frankenmoe.checkpoint.values import materialize
from frankenmoe.errors import SourceError
from frankenmoe.moe.linear import is_linear, keep_stored

WRONG_CONFIG = "check that config.json is the one that was saved with these weights"
LONGEST = 200  # characters of another library's message in ours
MLP_NAME = re.compile(r"(?:^|.*\.)(\d+)\.mlp$")


def as_tensor(write: TensorWrite) -> torch.Tensor:
    """A write as a torch tensor; the source's mapped pages themselves where the write is a plain copy."""
    raw = torch.from_numpy(materialize(write))
    return raw.view(getattr(torch, DTYPES[write.dtype].name)).view(write.shape)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder; SourceError for a model type this transformers does not know."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # its validators have classes of their own
        raise SourceError(
            f"transformers {transformers.__version__} cannot read {folder / 'config.json'}: {one_line(error)}",
            hint="if it needs code of its own and you trust it, say --trust-remote-code; or update transformers",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, never with code of its own; SourceError where there is none that can be loaded."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
        raise SourceError(
            f"{folder} has no tokenizer that transformers can load: {one_line(error)}",
            hint="put the tokenizer's files beside the base's weights, or fetch them again",
        ) from error


def load_dense(config: Any, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> PreTrainedModel:
    """A dense causal language model whose parameters are the given tensors, not copies of them.

    Goes through `from_pretrained`, so that tied weights, buffers and renamed keys are transformers' business.
    Raises SourceError if a parameter has no tensor, which transformers would otherwise fill with noise.
    """
    cls = causal_class(config)
    with quiet_transformers(), _explained(cls, config):
        model, report = cls.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
        )
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        raise SourceError(
            f"{len(lost)} parameters of {cls.__name__} have no tensor in the source, the first being {lost[0]}",
            hint="config.json and weights are of two different models",
        )
    return cast(PreTrainedModel, keep_stored(model.eval()))


def causal_class(config: Any) -> Any:
    """The causal language model class of a config; its own remote one only where the config itself came from such."""
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
    """Layer -> (the layer, its `mlp`) of any transformers decoder whose `mlp` maps hidden states and nothing else.

    SourceError for one that wants more, such as Bloom's, which adds the residual itself.
    """
    found = {}
    for name, module in model.named_modules():
        match = MLP_NAME.match(name)
        if match:
            found[int(match[1])] = (model.get_submodule(name.rpartition(".")[0]), module)
    for _, mlp in found.values():
        wanted = [key for key, value in signature(mlp.forward).parameters.items() if value.default is Parameter.empty]
        if len(wanted) > 1:
            raise SourceError(
                f"the `mlp` of {type(model).__name__} takes {' and '.join(wanted)}, expected hidden states alone",
                hint="only decoders whose `mlp` maps hidden states to hidden states can give experts",
            )
    return dict(sorted(found.items()))


def skeleton(config: Any) -> dict[int, nn.Module]:
    """Layer -> an `mlp` without weights, as this config's model has it."""
    cls = causal_class(config)
    with torch.device("meta"), quiet_transformers(), _explained(cls, config):
        model = cls._from_config(config)
    return {layer: mlp for layer, (_, mlp) in mlp_modules(model).items()}


def linear_names(config: Any) -> set[str]:
    """Names of the linear layers of this config's model that share their weight with nothing: no tied head."""
    cls = causal_class(config)
    with torch.device("meta"), quiet_transformers(), _explained(cls, config):
        model = cls._from_config(config)
    embeddings = model.get_input_embeddings().weight
    return {name for name, module in model.named_modules() if is_linear(module) and module.weight is not embeddings}


def fill(pattern: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of an `mlp` whose parameters are the given tensors, by name within the `mlp`."""
    # the memo lets deepcopy share the pattern's parameters, which are replaced at once, in place of copying them
    module = copy.deepcopy(pattern, {id(tensor): tensor for tensor in (*pattern.parameters(), *pattern.buffers())})
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise SourceError(
            f"the FFN tensors {', '.join(tensors)} do not fit {type(pattern).__name__}: {one_line(error)}",
            hint="this family stores its FFN under other names than it computes with; it cannot give experts yet",
        ) from error
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return keep_stored(module.eval())


@contextmanager
def _explained(cls: Any, config: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a model's own code says of a config that makes no sense to it
        where = Path(config._name_or_path) / "config.json" if config._name_or_path else "this config"
        raise SourceError(
            f"transformers cannot make a {cls.__name__} of {where}: {type(error).__name__} {one_line(error)}",
            hint=WRONG_CONFIG,
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back transformers' progress bars and reports while a model is put together here."""
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
    """What an error says, on one line and not for ever."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
