"""Generation settings as bases have them: what one reply can use is used, what no reply can use is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import GenerationConfig

import frankenmoe as fm
import tiny
from frankenmoe.cli.app import app
from frankenmoe.cli.text import spelled_out
from frankenmoe.errors import SourceError
from frankenmoe.moe.generate import reply
from frankenmoe.moe.generation import check_generation
from refusals import copy_of

Parents = dict[str, list[Path]]
ASK = [{"role": "user", "content": "hello"}]


def recipe_with(tmp_path: Path, parents: Parents, settings: dict[str, Any]) -> Path:
    base, one, two = parents["llama"]
    own = copy_of(base, tmp_path / "base")
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    return tiny.write_recipe(tmp_path / "r.yml", own, [one, two])


FINE: list[dict[str, Any]] = [
    {"eos_token_id": []},
    {"stop_strings": ["never ever"]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8], "forced_eos_token_id": 1},
    {"sequence_bias": [[[5], 2.0]]},
    {"num_beams": 1_000_000, "early_stopping": True, "length_penalty": 0.5},
    {"num_beams": 4, "num_return_sequences": 3},
    {"return_dict_in_generate": True, "output_scores": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 1.5},
    {"max_time": 0.0},
    {"do_sample": False, "temperature": 0.0},
    {"pad_token_id": -1},
    {"pad_token_id": 32000, "bos_token_id": 32001},
    {"do_sample": True, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "temperature": 0.7},
]


@pytest.mark.parametrize("settings", FINE, ids=str)
def test_settings_that_a_reply_can_live_with(settings: dict[str, Any], parents: Parents, tmp_path: Path) -> None:
    moe = fm.load(recipe_with(tmp_path, parents, settings))
    before = moe.model.generation_config.to_dict()
    made = reply(moe, moe.tokenizer(), ASK, max_new_tokens=3)
    assert 1 <= len(made.tokens) - len(moe.tokenizer()("hello")["input_ids"]) <= 3
    assert moe.model.generation_config.to_dict() == before


def test_a_stop_string_ends_the_reply(parents: Parents, tmp_path: Path) -> None:
    moe = fm.load(recipe_with(tmp_path, parents, {}))
    tokenizer = moe.tokenizer()
    whole = reply(moe, tokenizer, ASK, max_new_tokens=8)
    made = whole.tokens[len(tokenizer("hello")["input_ids"]) :]
    moe.model.generation_config.stop_strings = [tokenizer.decode(made[1:2])]
    assert len(reply(moe, tokenizer, ASK, max_new_tokens=8).tokens) < len(whole.tokens)


BAD: list[tuple[str, Any]] = [
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", "much"),
    ("encoder_repetition_penalty", math.nan),
    ("top_p", 7),
    ("min_p", -0.5),
    ("top_k", -3),
    ("no_repeat_ngram_size", 1.5),
    ("bad_words_ids", [[99999]]),
    ("bad_words_ids", []),
    ("bad_words_ids", [5]),
    ("suppress_tokens", [-4]),
    ("forced_eos_token_id", 10**30),
    ("forced_bos_token_id", True),
    ("eos_token_id", [1, 1.5]),
    ("sequence_bias", [[5, 2.0]]),
    ("sequence_bias", 3),
    ("stop_strings", [""]),
    ("stop_strings", ["x"] * 5000),
    ("stop_strings", [7]),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_settings_that_no_reply_can_use(key: str, value: Any) -> None:
    settings = GenerationConfig()
    setattr(settings, key, value)
    with pytest.raises(SourceError, match=rf"^config\.json has {key} .*expected") as caught:
        check_generation(settings, vocab=128, where="config.json")
    assert len(caught.value.message) < 300


def test_chat_refuses_before_the_first_token(parents: Parents, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, parents, {"bad_words_ids": [[4000]]})
    answer = CliRunner().invoke(app, ["chat", str(recipe), "--prompt", "hello"])
    assert isinstance(answer.exception, SourceError) or answer.exit_code == 2
    assert answer.stdout == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J\x00\r\x9b2J", "\\x1b[2J\\x00\\r\\x9b2J"),
        ("abc\u202edef", "abc\\u202edef"),
        ("👩\u200d👧 नमस्ते é", "👩\u200d👧 नमस्ते é"),
    ],
)
def test_control_characters_are_spelt_out(text: str, shown: str) -> None:
    assert spelled_out(text) == shown


def test_the_streamer_spells_them_out(parents: Parents, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from frankenmoe.cli.chat import SafeStreamer

    streamer = SafeStreamer(AutoTokenizer.from_pretrained(parents["llama"][0]))
    streamer.on_finalized_text("a\x1b[31m", stream_end=False)
    streamer.on_finalized_text("b", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[31mb\n"
