"""The settings of generation_config.json for one reply: which are used, which are refused, and where it ends."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from frankenmoe.errors import SourceError

# field -> (lowest, highest) value; where generation divides by it, the lowest is not 0
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1e-3, 1e3)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), (0, 1)),
    "length_penalty": (-1e3, 1e3),
}
# fields of whole numbers from 0 to MOST
COUNTS = (
    "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "max_length",
    "max_new_tokens",
)  # fmt: skip
MOST = 2**31 - 1
# fields of token ids, in lists of any depth; neither that of the padding token nor the temperature: a reply has its own
IDS = (
    "bad_words_ids", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip
# for several answers, another search than token by token, or a begin token: a reply is one answer that goes on from
# its prompt
OTHER_SEARCHES = (
    "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "early_stopping", "penalty_alpha",
    "dola_layers", "constraints", "force_words_ids", "prompt_lookup_num_tokens", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "guidance_scale", "max_time",
    "token_healing", "cache_implementation", "use_cache", "bos_token_id", "decoder_start_token_id",
)  # fmt: skip
MOST_STOPS = 1000  # stop strings, and letters of one


def end_tokens(settings: GenerationConfig, tokenizer: Any) -> tuple[int, ...]:
    """The tokens at which a reply ends: those of the settings, else that of the tokenizer; none if neither has one."""
    end = tokenizer.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
    return tuple(end) if isinstance(end, list) else () if end is None else (end,)


def check_generation(settings: GenerationConfig, *, vocab: int, where: str) -> None:
    """Raises SourceError for a setting that generation cannot use; `where` is the file it comes from."""
    for key, (lowest, highest) in RANGES.items():
        value = getattr(settings, key, None)
        if value is not None and not _in_range(value, lowest, highest):
            raise _refusal(where, key, value, f"a number from {lowest:g} to {highest:g}")
    for key in COUNTS:
        value = getattr(settings, key, None)
        if value is not None and not (type(value) is int and 0 <= value <= MOST):
            raise _refusal(where, key, value, f"a whole number from 0 to {MOST}")
    for key in IDS:
        bad = next((each for each in _ids(getattr(settings, key, None)) if not _is_id(each, vocab)), None)
        if bad is not None:
            raise _refusal(where, key, bad, f"token ids from 0 to {vocab - 1}")
    words = getattr(settings, "bad_words_ids", None)
    if words is not None and not (_is_list(words) and words and all(_is_list(word) and word for word in words)):
        raise _refusal(where, "bad_words_ids", words, "a list of lists of token ids")
    _check_bias(getattr(settings, "sequence_bias", None), vocab=vocab, where=where)
    stops = settings.stop_strings
    listed = [stops] if isinstance(stops, str) else stops or []
    if (
        not _is_list(listed)
        or len(listed) > MOST_STOPS
        or not all(isinstance(each, str) and 0 < len(each) <= MOST_STOPS for each in listed)
    ):
        raise _refusal(where, "stop_strings", stops, f"up to {MOST_STOPS} texts of up to {MOST_STOPS} letters")


@contextmanager
def plain_generation(model: Any, *, where: str) -> Iterator[None]:
    """Within the block, `model.generate` makes one reply token by token, with the other settings of the model.

    Raises SourceError for settings that cannot be used.
    """
    own = model.generation_config
    check_generation(own, vocab=int(model.config.vocab_size), where=where)
    plain, usual = copy.deepcopy(own), GenerationConfig()
    for key in OTHER_SEARCHES:
        if hasattr(plain, key):
            setattr(plain, key, getattr(usual, key, None))
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


def _check_bias(value: Any, *, vocab: int, where: str) -> None:
    """Checks `sequence_bias`: (token ids, bias) pairs, or a mapping of the one to the other."""
    if value is None:
        return
    pairs: Any = list(value.items()) if isinstance(value, Mapping) else value
    if not _is_list(pairs) or not all(_is_bias(pair, vocab) for pair in pairs):
        raise _refusal(where, "sequence_bias", value, "a list of [token ids, number]")


def _is_bias(pair: Any, vocab: int) -> bool:
    if not _is_list(pair) or len(pair) != 2:
        return False
    ids, bias = pair
    return _in_range(bias, -1e9, 1e9) and _is_list(ids) and all(_is_id(each, vocab) for each in ids)


def _in_range(value: object, lowest: float, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _ids(value: Any) -> Iterator[Any]:
    if _is_list(value):
        for each in value:
            yield from _ids(each)
    elif value is not None:
        yield value


def _is_id(value: object, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab


def _refusal(where: str, key: str, value: object, expected: str) -> SourceError:
    return SourceError(f"{where} has {key} {value!r:.60}, expected {expected}", hint="correct or remove that setting")
