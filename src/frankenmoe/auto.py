"""Virtual artifacts in transformers' Auto classes: AutoModelForCausalLM.from_pretrained(folder) gives the running MoE.

Imported together with transformers' tables of classes, so it imports torch and the stages only when a model is loaded.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from frankenmoe.artifact.record import MODEL_TYPE
from frankenmoe.checkpoint.hub import resolve
from frankenmoe.checkpoint.links import ADAPTERS
from frankenmoe.checkpoint.reader import unmap
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frankenmoe.subject import Subject

# what transformers and its users pass along that changes nothing here: where to download, how to read weights
IGNORED = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "proxies", "token", "code_revision"),
        *("low_cpu_mem_usage", "use_safetensors", "weights_only", "max_memory", "offload_folder", "tqdm_class"),
    }
)
# fields of a config that a running model obeys
ADJUSTED = ("use_cache", "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id")


class FrankenMoEConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers has no types
    """config.json of a virtual artifact: which class loads it, and a few sizes. The recipe is in the record.

    An instance says that it is of the base's type, because AutoTokenizer chooses the class of a tokenizer by that.
    """

    model_type = MODEL_TYPE

    def __init__(self, *, base_model_type: str = "", **fields: Any) -> None:
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

        super().__init__(**fields)
        self.base_model_type = base_model_type
        self.model_type = base_model_type or MODEL_TYPE
        self.tokenizer_class = TOKENIZER_MAPPING_NAMES.get(base_model_type)


class FrankenMoEForCausalLM:
    """Loads virtual artifacts for transformers. There are no instances: a model has the class of its base."""

    config_class = FrankenMoEConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *arguments: Any,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        subfolder: str = "",
        adapter_kwargs: Mapping[str, Any] | None = None,
        adapter_name: str = "default",
        **options: Any,
    ) -> Any:
        """The running MoE of a folder or hub id, as `frankenmoe.load` gives it: weights stay mapped from its sources.

        `num_experts_per_tok` in `config` is the number of experts per token. `device_map` is one device, or "auto".
        With `trust_remote_code`, Python code in a source may run too. Where the folder of a PEFT adapter was named,
        transformers passes it in `adapter_kwargs`. Raises subclasses of FrankenMoEError, for other options too.
        """
        told = {key: options.pop(key, getattr(config, key, None)) for key in ADJUSTED}
        folder = resolve(
            str(name),
            revision=None if Path(name).is_dir() else revision,
            folder=Path.cwd(),
            subfolders=[subfolder] if subfolder else [ADAPTERS],
        )
        if subfolder:
            folder = folder / subfolder
            name = folder
        unknown = [key for key, value in options.items() if value not in (None, False, "", {}) and key[:1] != "_"]
        _refuse(name, sorted(set(unknown) - IGNORED))
        from frankenmoe.build.virtual import SIZES, virtual_config
        from frankenmoe.subject import open_subject

        subject = open_subject(
            folder,
            trust_remote_code=bool(trust_remote_code),
            experts_per_token=getattr(config, "num_experts_per_tok", None),
        )
        own = virtual_config(subject.plan)
        _refuse(name, [f"another {key}" for key in SIZES if getattr(config, key, None) not in (None, own.get(key))])
        model = subject.load(dtype=_dtype(dtype or torch_dtype), device=_device(name, device_map)).model
        model.config.update({key: value for key, value in told.items() if value is not None})
        attention = attn_implementation or getattr(config, "_attn_implementation", None)
        if attention is not None:
            model.set_attn_implementation(attention)
        _become_virtual(model, str(name), subject)
        adapter = dict(adapter_kwargs or {})
        if (place := adapter.pop("_adapter_model_path", None)) is not None:
            model.load_adapter(place, adapter_name=adapter_name, adapter_kwargs=adapter)
        loaded: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, loaded | {"error_msgs": []}) if output_loading_info else model

    @classmethod
    def _from_config(cls, *arguments: Any, **options: Any) -> None:
        """Refuses what transformers asks for in `from_config`."""
        raise PlanError(
            "the config of a virtual artifact of frankenmoe does not say what its model consists of",
            hint="load the model from the artifact's folder with from_pretrained",
        )


class Virtual:
    """What a model that is mapped from an artifact's sources does otherwise than one with weights of its own."""

    frankenmoe_subject: Any  # a Subject; transformers evaluates the types here

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Builds the artifact: a checkpoint that transformers loads without frankenmoe.

        The weights are written as they are stored, whatever type they were loaded in. ArtifactError if they, or those
        in `state_dict`, are not what loading gives: then they are not what the recipe says. With a PEFT adapter on the
        model, only the adapter is saved, as transformers does.
        """
        from frankenmoe.build.run import build

        if push_to_hub:
            self.push_to_hub()
        if getattr(self, "_hf_peft_config_loaded", False):
            how = {"is_main_process": is_main_process, "state_dict": state_dict, **options}
            super().save_pretrained(save_directory, **how)  # type: ignore[misc]  # of the base's class
        elif is_main_process:
            _check_unchanged(self, self.frankenmoe_subject, state_dict)
            build(self.frankenmoe_subject, save_directory)

    def push_to_hub(self, *arguments: Any, **options: Any) -> None:
        """Refuses: `frankenmoe push` looks for private paths before it sends an artifact."""
        folder = self.frankenmoe_subject.origin
        raise ArtifactError(
            f"{folder} is a virtual artifact of frankenmoe, which push_to_hub cannot send",
            hint=f"frankenmoe push {folder} ORG/NAME",
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles with the class of the base, since no module holds this one."""
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_empty, type(self).__bases__[1:], *rest)


def register_config(table: ModuleType) -> None:
    """Makes AutoConfig know the config; `table` is transformers' configuration_auto."""
    table.AutoConfig.register(MODEL_TYPE, FrankenMoEConfig, exist_ok=True)


def register_model(table: ModuleType) -> None:
    """Makes AutoModelForCausalLM know the loader; `table` is transformers' modeling_auto."""
    table.AutoModelForCausalLM.register(FrankenMoEConfig, FrankenMoEForCausalLM, exist_ok=True)


def _refuse(name: str | Path, options: list[str]) -> None:
    """Raises PlanError if there are options that a virtual artifact does not have."""
    if options:
        raise PlanError(
            f"{name} is a virtual artifact of frankenmoe, which cannot be loaded with {', '.join(options)}",
            hint=f"make a checkpoint of it first: frankenmoe build {name} OUT",
        )


def _become_virtual(model: "PreTrainedModel", name: str, subject: "Subject") -> None:
    """Gives a model the methods of Virtual, and the name by which a trained adapter finds it again."""
    own: Any = type(model)
    model.__class__ = _virtual(own)
    model.frankenmoe_subject = subject
    model.name_or_path = model.config._name_or_path = name


@cache
def _virtual(own: type) -> Any:
    """The class of the models of one base class."""
    return type(own.__name__, (Virtual, own), {"__module__": own.__module__})


def _empty(own: type) -> Any:
    """A model of that class before it gets its content, for pickle."""
    made = _virtual(own)
    return made.__new__(made)


def _check_unchanged(model: Any, subject: "Subject", state: Mapping[str, Any] | None) -> None:
    """Raises ArtifactError unless every tensor of a loaded model, or of `state`, is what loading it again gives."""
    import torch

    unmap()  # or loading would find changes that were made to the mapped pages
    again = subject.load(dtype=str(model.dtype).removeprefix("torch.")).model.state_dict()
    now = model.state_dict() if state is None else state
    changed = [name for name in now if name not in again or not torch.equal(now[name].cpu(), again[name])]
    changed += [name for name in again if name not in now]
    if changed:
        raise ArtifactError(
            f"{counted(len(changed), 'tensor')} of the model changed since {subject.origin} was loaded, the first is "
            f"{changed[0]}; only what its recipe says can be written",
            hint="save a trained adapter by PEFT's save_pretrained, or train with `frankenmoe train`",
        )


def _dtype(wanted: Any) -> str | None:
    """The name of a type as frankenmoe knows it; None for `auto`, the type that is stored."""
    return None if wanted in (None, "auto") else str(wanted).removeprefix("torch.")


def _device(name: str | Path, wanted: Any) -> str:
    """The one device in a `device_map`. PlanError for a map over several."""
    if isinstance(wanted, dict):
        devices = set(map(str, wanted.values()))
        if len(devices) != 1:
            raise PlanError(
                f"{name} is a virtual artifact of frankenmoe, which runs on one device, found a device_map of "
                f"{len(devices)} devices",
                hint='use device_map="auto"',
            )
        (wanted,) = wanted.values()
    if wanted is None:
        return "cpu"
    if isinstance(wanted, int):
        return f"cuda:{wanted}"
    return "auto" if wanted in ("auto", "balanced", "balanced_low_0", "sequential") else str(wanted)
