"""The parents trained on real text beside the checkout: equal forms, and experts that know their text."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import frankenmoe as fm
import tiny
from frankenmoe.evaluate.perplexity import mean_loss

DOMAINS = ("shakespeare", "math", "french", "python")
CHARACTERS = 6000


def test_real_parents_merge_and_their_own_experts_help(shared_models: Path, tmp_path: Path) -> None:
    base, parents = shared_models / "base", [shared_models / f"expert-{domain}" for domain in DOMAINS]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, parents, prompts=True, gate_mode="hidden")
    built = fm.build(recipe, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32).eval()
    ids = tiny.ids(16)
    with torch.no_grad():
        expected = stock(ids).logits
        for what in (recipe, built):
            assert torch.allclose(fm.load(what, dtype="float32").model(ids).logits, expected, atol=1e-4)
    tokenizer, dense = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    )
    for domain, parent in zip(DOMAINS, parents, strict=True):
        text = (shared_models.parent / "text" / f"{domain}.heldout.txt").read_text()[:CHARACTERS]
        forced = fm.load(
            tiny.write_recipe(tmp_path / "f.yml", base, [parent], experts_per_token=1), dtype="float32"
        ).model
        assert mean_loss(forced, tokenizer, text) < mean_loss(dense, tokenizer, text), domain
