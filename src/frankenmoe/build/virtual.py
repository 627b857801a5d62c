"""What a virtual artifact contains besides recipe, record and routers. Does not import torch.

That is the tokenizer, and what transformers needs to find frankenmoe's class: a config, and a module of a few lines for
`trust_remote_code`.
"""

from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import write_json
from frankenmoe.artifact.record import MODEL_TYPE
from frankenmoe.build.body import copy_small_files
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.planning import Plan

MODULE = "modeling_frankenmoe"
CONFIG, LOADER = "FrankenMoEConfig", "FrankenMoEForCausalLM"
CODE = f'''"""Lets transformers load this folder with trust_remote_code=True. The code is in the package frankenmoe."""

try:
    from frankenmoe.auto import {CONFIG}, {LOADER}
except ImportError as error:
    raise ImportError(
        "this model is a virtual artifact of frankenmoe, which is not installed: pip install 'frankenmoe[cpu]'"
    ) from error

__all__ = ["{CONFIG}", "{LOADER}"]
'''
# of the base's config, for programs that look at a config without loading the model
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
SHOWN = (*SIZES, "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def copy_virtual_files(plan: Plan, folder: Path) -> None:
    """Writes the small files of a virtual artifact into `folder`."""
    copy_small_files(plan, folder)
    write_json(folder / "config.json", virtual_config(plan))
    write_atomic(folder / f"{MODULE}.py", CODE.encode())


def virtual_config(plan: Plan) -> dict[str, Any]:
    """config.json of a virtual artifact."""
    base = plan.base.config
    return {
        "model_type": MODEL_TYPE,
        # TRL and `transformers serve` look this name up in transformers, where FrankenMoEForCausalLM is not
        "architectures": ["AutoModelForCausalLM"],
        "auto_map": {"AutoConfig": f"{MODULE}.{CONFIG}", "AutoModelForCausalLM": f"{MODULE}.{LOADER}"},
        "base_model_type": base.get("model_type"),
        **{key: base[key] for key in SHOWN if base.get(key) is not None},
        "num_local_experts": plan.experts,
        "num_experts_per_tok": plan.recipe.experts_per_token,
        "dtype": plan.dtype_name,
    }
