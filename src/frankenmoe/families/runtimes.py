"""Which programs run a format, and how that is known: tried here with a version, or read in the program's tables."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.formats import FORMATS
from frankenmoe.families.spec import Family, MoEFormat

LLAMACPP = "tried: llama.cpp b11549 (xllamacpp 2026.10)"
TRANSFORMERS = "tried: transformers 5.23"
VLLM_TRIED = "tried: vLLM 0.32"


@dataclass(frozen=True, slots=True)
class Known:
    """Whether a program runs a format, and how that is known, or why it does not."""

    runs: bool
    how: str


# (family, format): with a format alone nothing is tried, as families differ in windows, rotation and biases
VLLM: Mapping[tuple[str, str], Known] = {
    ("llama", "mixtral"): Known(True, VLLM_TRIED),
    ("qwen2", "qwen2_moe"): Known(True, VLLM_TRIED),
    ("qwen3", "qwen3_moe"): Known(True, VLLM_TRIED),
    ("olmo2", "flex_olmo"): Known(True, VLLM_TRIED),
    # the format's code there lacks something that the family has (read)
    ("gemma", "granitemoe"): Known(False, "vLLM's Granite MoE supports only silu"),
    ("llama", "granitemoe"): Known(False, "vLLM's Granite MoE has no attention biases"),
}
NOT_IN_VLLM: Mapping[str, Known] = {
    "deepseek": Known(False, "vLLM 0.32 asks for trust_remote_code and the hub"),
}
# models of a family that llama.cpp does not run, though it runs others
LLAMACPP_LACKS: Mapping[str, str] = {"phi3": "models with longrope are refused"}
READ_VLLM = Known(True, "read: in the registry of vLLM 0.32")


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
            yield Pair(family.model_type, fmt.name, fmt.title, _shared(fmt), programs(fmt, family))


def _shared(fmt: MoEFormat) -> tuple[str, ...]:
    gated = ("gated",) if fmt.shared_gate else ()
    return ("plain", *gated) if fmt.max_shared else ()


def in_vllm(family: str, fmt: str) -> Known:
    """What is known of vLLM and a format made of a family."""
    return NOT_IN_VLLM.get(fmt) or VLLM.get((family, fmt), READ_VLLM)


def programs(fmt: MoEFormat, family: Family) -> dict[str, Known]:
    """What is known of a format made of a family, by program."""
    activation = family.defaults.get("hidden_act")
    if fmt.no_gguf:
        llama = Known(False, f"llama.cpp: {fmt.no_gguf}")
    elif activation != "silu":
        llama = Known(False, f"llama.cpp: its experts support only silu, not {activation}")
    else:
        llama = Known(True, "; ".join(filter(None, (LLAMACPP, LLAMACPP_LACKS.get(family.model_type)))))
    needs_code = Known(False, "its class is remote code, which transformers 5 no longer runs")
    return {
        "transformers": Known(True, TRANSFORMERS) if fmt.loads_in_transformers else needs_code,
        "llama.cpp": llama,
        "vLLM": in_vllm(family.model_type, fmt.name),
        "Ollama": Known(llama.runs, "read: it runs files of llama.cpp; not tried" if llama.runs else llama.how),
    }
