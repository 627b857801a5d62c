"""Parents as running models: dense ones compute as MoEs do."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from frankenmoe.evaluate.parents import stock_model
from frankenmoe.moe import linear


def test_a_16_bit_parent_is_multiplied_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as the MoE beside it where the CPU has no such products."""
    folder = tiny.make_parent(tmp_path / "parent", seed=0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seen: list[torch.Size] = []
    ours = linear._product
    monkeypatch.setattr(linear, "SMALL", 0)
    monkeypatch.setattr(linear, "torch_is_fast", lambda shape, dtype: False)
    monkeypatch.setattr(linear, "_product", lambda hidden, *rest: (seen.append(hidden.shape), ours(hidden, *rest))[1])
    with torch.inference_mode():
        found = stock_model(folder, dtype=torch.bfloat16)(input_ids=tiny.ids()).logits
        assert len(seen) == sum(isinstance(part, torch.nn.Linear) for part in plain.modules())
        torch.testing.assert_close(found, plain(input_ids=tiny.ids()).logits, atol=0.05, rtol=0.05)
