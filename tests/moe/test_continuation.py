"""Sequences that are continued together get the tokens that transformers gives to each of them alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from frankenmoe.evaluate.parents import stock_model
from frankenmoe.moe.continuation import Continuation, Together
from frankenmoe.moe.joining import branch
from frankenmoe.moe.load import MoE

# prompts of several lengths, the step at which each begins, and the tokens it gets
CASES = ((0, [5, 9, 20, 7, 33, 60, 8], 14), (0, [40, 3], 6), (3, [9] * 12, 9), (4, [8, 90, 44], 12), (9, [77], 4))
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},  # shorter than most of the sequences
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "olmo2": {},
}


def opened(folder: Path, family: str = "llama", settings: Any = None, **changes: Any) -> MoE:
    tiny.make_parent(folder, family, max_position_embeddings=128, **changes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [], **(settings or {})}))
    return MoE(stock_model(folder, dtype=None), (), folder)


def alone(moe: MoE, ids: list[int], tokens: int) -> list[int]:
    """What transformers writes, greedy."""
    made = moe.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return list(made[0, len(ids) :].tolist())


def begun(moe: MoE, ids: list[int], tokens: int, **options: Any) -> tuple[Continuation, list[int]]:
    part = Continuation(moe, moe.tokenizer(), ids, max_new_tokens=tokens, **options)
    return part, [part.choose(part.read())]


def together(moe: MoE, **options: Any) -> tuple[list[list[int]], list[Continuation]]:
    """The tokens of CASES, which come and go."""
    made: dict[int, list[int]] = {}
    all_parts: dict[int, Continuation] = {}
    group, step = Together(moe.model), 0
    while len(made) < len(CASES) or any(not part.ended for part in all_parts.values()):
        for at, (start, ids, tokens) in enumerate(CASES):
            if start == step:
                all_parts[at], made[at] = begun(moe, ids, tokens, seed=at, **options)
                assert all_parts[at].can_join
        live = [at for at in sorted(made) if not all_parts[at].ended]
        group.change([all_parts[at] for at in live])
        if live:
            for at, logits_V in zip(live, group.read(), strict=True):
                made[at].append(all_parts[at].choose(logits_V))
        step += 1
    group.change([])
    return [made[at] for at in range(len(CASES))], [all_parts[at] for at in range(len(CASES))]


@pytest.mark.parametrize("family", list(MODELS))
def test_tokens_are_those_of_transformers_whoever_is_beside(family: str, tmp_path: Path) -> None:
    moe = opened(tmp_path / "model", family, **MODELS[family])
    with torch.no_grad():
        made, parts = together(moe)
        assert made == [alone(moe, ids, tokens) for _, ids, tokens in CASES]
        for part in parts:  # what is left of a sequence can be continued, and its cache has no other size
            whole = part.ids_1T[0].tolist()
            assert part.known == len(whole) - 1 == part.cache.get_seq_length()
            more, first = begun(moe, whole, 5, past=(branch(part.cache), part.known))
            for _ in range(4):
                first.append(more.choose(more.read()))
            assert first == alone(moe, whole, 5)
            for layer in part.cache.layers:
                held, column = layer.keys.untyped_storage().nbytes(), layer.keys[:, :, :1].nbytes
                assert held <= layer.keys.nbytes + column  # transformers itself keeps the token before a window


def test_a_seed_decides_alone_and_together(tmp_path: Path) -> None:
    moe = opened(tmp_path / "model", settings={"top_k": 30, "repetition_penalty": 1.3})
    with torch.no_grad():
        made, _ = together(moe, temperature=1.2)
        for at, (_, ids, tokens) in enumerate(CASES):
            part, own = begun(moe, ids, tokens, seed=at, temperature=1.2)
            while not part.ended:
                own.append(part.choose(part.read()))
            assert own == made[at]
            torch.manual_seed(at)  # transformers draws from the same generator, in the same order
            drawn = moe.model.generate(
                torch.tensor([ids]), max_new_tokens=tokens, do_sample=True, temperature=1.2, pad_token_id=0
            )
            assert own == drawn[0, len(ids) :].tolist()


def test_settings_end_it_as_in_transformers(tmp_path: Path) -> None:
    moe = opened(tmp_path / "model")
    ids, tokenizer = CASES[0][1], moe.tokenizer()
    whole = alone(moe, ids, 14)
    (moe.folder / "generation_config.json").unlink()
    moe.model.generation_config.stop_strings = [tokenizer.decode(whole[3:5])]
    with torch.no_grad():
        part, made = begun(moe, ids, 14)
        while not part.ended:
            made.append(part.choose(part.read()))
    wanted = moe.model.generate(
        torch.tensor([ids]), max_new_tokens=14, do_sample=False, pad_token_id=0, tokenizer=tokenizer
    )
    assert made == wanted[0, len(ids) :].tolist()
    assert len(made) < 14


def test_a_model_with_another_memory_goes_alone(tmp_path: Path) -> None:
    layers = ["linear_attention", "full_attention"]
    moe = opened(tmp_path / "model", "qwen3_5_text", layer_types=layers)
    with torch.no_grad():
        part, made = begun(moe, CASES[0][1], 6)
        assert not part.can_join
        twin = branch(part.cache)
        while not part.ended:
            made.append(part.choose(part.read()))
        assert made == alone(moe, CASES[0][1], 6)
        assert twin.get_seq_length() == len(CASES[0][1])


def test_a_model_whose_rotary_angles_turn_goes_alone_and_is_read_again(tmp_path: Path) -> None:
    rotary = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 2.5, 3.0],
        "original_max_position_embeddings": 11,
    }
    moe = opened(tmp_path / "model", "phi3", rope_parameters=rotary, original_max_position_embeddings=11)
    ids = CASES[0][1]
    with torch.no_grad():
        part, made = begun(moe, ids, 14)
        assert not part.can_join
        short = branch(part.cache), part.known
        while not part.ended:
            made.append(part.choose(part.read()))
        assert made == alone(moe, ids, 14)  # transformers reads the whole again, too
        longer = [*ids, *CASES[2][1]]
        more, first = begun(moe, longer, 5, past=short)
        assert (first[0], more.known) == (alone(moe, longer, 1)[0], len(longer))
