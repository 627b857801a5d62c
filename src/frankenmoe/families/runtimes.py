"""Which programs run a format, and how that is known: run here with a version, or read in the program's tables."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from frankenmoe.families.archs import ARCHS, Arch
from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.formats import FORMATS
from frankenmoe.families.spec import Family, MoEFormat

RUN_HERE = "run here"
LLAMACPP = f"{RUN_HERE}: llama.cpp b11549 (xllamacpp 2026.10.11549)"
TRANSFORMERS = f"{RUN_HERE}: transformers 5.23"
VLLM = f"{RUN_HERE}: vLLM 0.32 (CPU, float32)"
VLLM_ROUNDED = f"{RUN_HERE}: vLLM 0.32 (CPU, bfloat16)"


@dataclass(frozen=True, slots=True)
class Known:
    """Whether a program runs a format, and how that is known, or why it does not."""

    runs: bool
    how: str


COHERE_IN_VLLM = "with a tied head, without attention biases"
GLM4_IN_VLLM = Known(
    True,
    f"{VLLM}, with a shared expert and a head of its own; with a tied head it writes nonsense, and without a shared "
    "expert it divides by zero on a CPU (GPUs were not tried)",
)
# (family, format): with a format alone nothing is known, as families differ in windows, rotation and biases
IN_VLLM: Mapping[tuple[str, str], Known] = {
    ("llama", "mixtral"): Known(True, VLLM),
    ("qwen2", "qwen2_moe"): Known(True, VLLM),
    ("qwen3", "qwen3_moe"): Known(True, f"{VLLM}, without attention biases"),
    ("olmo2", "flex_olmo"): Known(True, VLLM),
    ("mistral", "mixtral"): Known(True, VLLM),
    ("phi3", "mixtral"): Known(True, VLLM),
    ("helium", "mixtral"): Known(True, VLLM),
    ("seed_oss", "qwen2_moe"): Known(True, VLLM),
    ("llama", "granitemoeshared"): Known(True, VLLM),
    ("hyperclovax", "granitemoe"): Known(True, VLLM),
    ("cohere", "cohere2_moe"): Known(True, f"{VLLM}, {COHERE_IN_VLLM}"),
    ("gemma3_text", "gemma4"): Known(True, VLLM),
    ("gemma4_text", "gemma4"): Known(True, VLLM),
    ("qwen3_vl", "qwen3_vl_moe"): Known(True, f"{VLLM}, without attention biases; pictures were not tried"),
    ("cohere2", "cohere2_moe"): Known(
        True,
        f"{VLLM}, {COHERE_IN_VLLM}, and with a sliding_window less by one, as its windows reach one token further, in "
        "dense models too",
    ),
    ("granite", "granitemoe"): Known(True, VLLM),
    ("granite", "granitemoeshared"): Known(True, VLLM),
    ("ernie4_5", "ernie4_5_moe"): Known(True, VLLM),
    ("smollm3", "granitemoe_swa"): Known(True, f"{VLLM}, without attention biases"),
    ("ministral", "granitemoe_swa"): Known(True, VLLM),
    ("granitemoehybrid", "granitemoehybrid"): Known(True, VLLM),
    ("glm", "glm4_moe"): GLM4_IN_VLLM,
    ("phi3", "glm4_moe"): GLM4_IN_VLLM,
    ("lfm2", "lfm2_moe"): Known(
        False,
        f"{VLLM}: on a CPU it rotates LFM2's queries and keys by wrong positions, with that corrected it writes the "
        "same tokens (GPUs were not tried); it always ties the head",
    ),
    ("qwen3_5_text", "qwen3_5_moe"): Known(True, f"{VLLM_ROUNDED}; as near to float32 as transformers in bfloat16"),
    # the format's code there lacks something that the family has (read)
    ("gemma", "granitemoe"): Known(False, "vLLM's Granite MoE supports only silu"),
    ("llama", "granitemoe"): Known(False, "vLLM's Granite MoE has no attention biases"),
}
NOT_IN_VLLM: Mapping[str, Known] = {
    "deepseek": Known(False, "vLLM 0.32 asks for trust_remote_code and the hub"),
}
# (family, format): models of a family that llama.cpp does not run, though it runs others
LLAMACPP_LACKS: Mapping[tuple[str, str], str] = {
    ("phi3", "glm4_moe"): "models with longrope are refused",
    ("qwen3", "qwen3_moe"): "models with attention biases are refused",
    ("qwen3_vl", "qwen3_vl_moe"): "what reads pictures is left out, and models with attention biases are refused",
    ("lfm2", "lfm2_moe"): "models with biases of the convolution, or without an attention layer, are refused",
    ("cohere2", "cohere2_moe"): "models with attention biases or without windows are refused",
    ("cohere", "cohere2_moe"): "models with attention biases are refused",
    ("smollm3", "granitemoe_swa"): "models without rotation are refused",
    ("gemma3_text", "gemma4"): "models with attention biases are refused",
    ("gemma4_text", "gemma4"): "models with attention biases are refused",
    ("granitemoehybrid", "granitemoehybrid"): (
        "models without an attention layer or of attention layers without rotation, and convolutions without biases, "
        "are refused"
    ),
    ("nemotron_h", "nemotron_h"): (
        "models without Mamba or attention layers, with biases in Mamba layers, or with convolutions without biases "
        "are refused"
    ),
    ("qwen3_5_text", "qwen3_5_moe"): "models without an attention layer are refused",
}
# llama.cpp's architectures that Ollama's copy of it does not have (github.com/ollama/ollama, llama/llama.cpp)
NOT_IN_OLLAMA = ("granite_swa", "cohere2moe", "gemma4")
# those that Ollama runs with code of its own (model/models)
OLLAMAS_OWN = ("nemotron_h_moe",)


@dataclass(frozen=True, slots=True)
class Pair:
    """A family and a format that it can be built as. `shared` are the kinds of shared expert the format holds."""

    family: str
    fmt: str
    title: str
    shared: tuple[str, ...]
    programs: Mapping[str, Known]

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "format": self.fmt,
            "title": self.title,
            "shared_expert": list(self.shared),
            "programs": {name: asdict(known) for name, known in self.programs.items()},
        }


def pairs() -> Iterator[Pair]:
    """Every family with every format, in the order in which formats are tried."""
    for family in FAMILIES.values():
        for fmt in (fmt for fmt in FORMATS.values() if family.model_type in fmt.families):
            yield Pair(source_type(family, fmt), fmt.name, fmt.title, _shared(fmt), programs(fmt, family))


def source_type(family: Family, fmt: MoEFormat) -> str:
    """The model type of what becomes a format: the family's, or that of the model that it must be nested in."""
    return fmt.inside.wrapper if fmt.inside else family.model_type


def _shared(fmt: MoEFormat) -> tuple[str, ...]:
    gated = ("gated",) if fmt.shared_gate else ()
    return ("plain", *gated) if fmt.max_shared else ()


def in_vllm(family: str, fmt: str) -> Known:
    """What is known of vLLM and a format made of a family."""
    listed = f"read: {FORMATS[fmt].architecture} is in the registry of vLLM 0.32; not run with this family"
    return NOT_IN_VLLM.get(fmt) or IN_VLLM.get((family, fmt)) or Known(True, listed)


def in_llamacpp(family: Family, fmt: MoEFormat) -> Known:
    """What is known of llama.cpp and a format made of a family."""
    if fmt.no_gguf:
        return Known(False, f"llama.cpp: {fmt.no_gguf}")
    arch, activation = _arch(fmt), family.read({}, "hidden_act")
    if activation != arch.activation:
        return Known(False, f"llama.cpp: its {arch.name} has experts with {arch.activation} only, not {activation}")
    lacks = LLAMACPP_LACKS.get((source_type(family, fmt), fmt.name))
    return Known(True, "; ".join(filter(None, (LLAMACPP, lacks))))


def _arch(fmt: MoEFormat) -> Arch:
    """The first of llama.cpp's architectures for a format."""
    return next(arch for arch in ARCHS if fmt.name in arch.formats)


def _in_ollama(fmt: MoEFormat, llama: Known) -> Known:
    if not llama.runs:
        return Known(False, llama.how)
    name = _arch(fmt).name
    if name in NOT_IN_OLLAMA:
        return Known(False, f"read: its copy of llama.cpp has no {name}")
    engine = "own engine" if name in OLLAMAS_OWN else "copy of llama.cpp"
    return Known(True, f"read: its {engine} has {name}; not run here")


def programs(fmt: MoEFormat, family: Family) -> dict[str, Known]:
    """What is known of a format made of a family, by program."""
    llama = in_llamacpp(family, fmt)
    needs_code = Known(False, "its class is remote code, which transformers 5 no longer runs")
    return {
        "transformers": Known(True, TRANSFORMERS) if fmt.loads_in_transformers else needs_code,
        "llama.cpp": llama,
        "vLLM": in_vllm(source_type(family, fmt), fmt.name),
        "Ollama": _in_ollama(fmt, llama),
    }
