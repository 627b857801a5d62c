"""Dense families that no stock MoE format can represent, with the reason."""

from collections.abc import Mapping

from frankenmoe.families.dense import FAMILIES

SOFTCAP = "it caps attention scores by tanh, which no MoE class of transformers does"
STREAMS = "its layers exchange more than one residual stream (AltUp), which no MoE class does"
UNGATED = "its FFN has no gate, and stock experts have one"
VIRTUAL: Mapping[str, str] = {
    "gemma2": SOFTCAP,
    "vaultgemma": SOFTCAP,
    "gemma3n": STREAMS,
    "gemma3n_text": STREAMS,
    "olmo": "its norms have no weights, which no MoE class allows",
    "olmo3": "it has windows beside norms over all of q and k, and FlexOlmo has no windows",
    "ministral3": "it scales queries by their position, which no MoE class does",
    "phi": UNGATED,
    "starcoder2": UNGATED,
    "gpt2": UNGATED,
    "gpt_neo": UNGATED,
    "gpt_neox": UNGATED,
    "gptj": UNGATED,
    "gpt_bigcode": UNGATED,
    "falcon": UNGATED,
    "bloom": UNGATED,
    "opt": UNGATED,
    "apertus": "its FFN has no gate and a learned activation (xIELU), and stock experts have a gate",
    "falcon_h1": "its layers run attention and Mamba side by side, which no MoE class does",
    "zamba2": "its layers share one attention block, which no MoE class does",
}

# family with a format -> its models that have none all the same; `plan` names the setting
PARTLY: Mapping[str, str] = {
    "gemma4_text": "E2B, whose last layers have FFNs twice as wide, where a Gemma 4 MoE has experts of one width",
    "hyperclovax": "SEED Think 14B, which has norms behind attention and FFN, as no Granite MoE has",
    "cohere": "Command R+, which has norms of queries and keys, as no Cohere2 MoE has",
}


def why_virtual(model_type: str) -> str:
    """The reason why a model of a type without a table cannot be built."""
    reason = VIRTUAL.get(model_type)
    if reason is not None:
        return f"{model_type!r} fits no stock MoE format: {reason}"
    return f"{model_type!r} has no MoE format to build; families that have one: {', '.join(FAMILIES)}"
