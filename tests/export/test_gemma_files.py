"""Gemma 3 in GGUF files: what float16 is too narrow for is kept in other types, in the file and in the cache."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import frankenmoe as fm
import gguftools
import tiny
from family_cases import CASES
from frankenmoe.checkpoint.gguffile import VALUES, facts_of, open_gguf
from frankenmoe.export.check import kl
from frankenmoe.export.importance import measure
from frankenmoe.export.llama import Engine
from frankenmoe.export.run import export_gguf
from frankenmoe.planning.gguf import layout
from frankenmoe.subject import open_subject

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROWED = ("attn_v.weight", "attn_output.weight")


def recipe_of(root: Path, family: str) -> Path:
    """A recipe of two random parents, with rows that every plain type can hold."""
    case = next(case for case in CASES.values() if case.family == family)
    sizes = (
        case.sizes | WIDE | {"initializer_range": 0.05, "final_logit_softcapping": None, "max_position_embeddings": 256}
    )
    parents = gguftools.parents(root, family, count=2, **{key: sizes[key] for key in sizes if key != "vocab_size"})
    return tiny.write_recipe(root / "r.yml", parents[0], parents)


@pytest.mark.parametrize(
    ("name", "kept"), [("f32", "F32"), ("f16", "F32"), ("bf16", "BF16"), ("q8_0", "BF16"), ("q4_0", "BF16")]
)
def test_small_numbers_are_kept_in_a_wide_type(name: str, kept: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "gemma3_text")
    (file,) = export_gguf(recipe, tmp_path / "out", types=[name], allow_random=True)
    types = {tensor: kind for tensor, (kind, _) in gguftools.tensors(file.path).items()}
    assert {kind for tensor, kind in types.items() if tensor.endswith(NARROWED)} == {kept}
    assert types["blk.0.attn_q.weight"] == name.upper()
    assert any("--cache-type-v bf16" in note for note in file.notes)


def distances(file: Path, recipe: Path, prompts: Sequence[Sequence[int]], *, exact_cache: bool) -> float:
    moe, engine = fm.load(recipe), Engine(file, context=256, exact_cache=exact_cache)
    vocab = moe.model.config.vocab_size
    found = []
    for ids in prompts:
        logprobs_V = moe.model(input_ids=tiny.torch.tensor([list(ids)])).logits[0, -1].float().log_softmax(-1)
        found.append(kl(logprobs_V.detach().numpy(), engine.next_token(ids, top=vocab)))
    return sum(found) / len(found)


def test_the_cache_of_values_has_the_type_that_the_file_asks_for(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "gemma3_text")
    (file,) = export_gguf(recipe, tmp_path / "out", types=["f16"], allow_random=True)
    assert facts_of(open_gguf(file.path))[VALUES] == "bf16"
    prompts = [tiny.ids(length, batch=1, vocab=400, seed=length)[0].tolist() for length in (20, 60, 120)]
    assert distances(file.path, recipe, prompts, exact_cache=True) < 1e-3
    assert distances(file.path, recipe, prompts, exact_cache=False) < 1e-3


def test_gemma_4_needs_none_of_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "gemma4_text")
    (file,) = export_gguf(recipe, tmp_path / "out", types=["q8_0"], allow_random=True)
    types = {tensor: kind for tensor, (kind, _) in gguftools.tensors(file.path).items()}
    assert types["blk.0.attn_v.weight"] == types["blk.0.attn_output.weight"] == "Q8_0"
    assert VALUES not in facts_of(open_gguf(file.path))
    assert file.notes == ()


def test_importance_is_measured(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "gemma4_text")
    folder = fm.build(recipe, tmp_path / "built").folder
    found = measure(fm.load(folder), layout(open_subject(folder).parts), [tiny.ids(97, batch=1, vocab=400)[0].tolist()])
    names = {tensor.split(".", 2)[2].removesuffix(".weight") for tensor in found.importance}
    assert {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"} <= names
