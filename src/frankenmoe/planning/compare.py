"""Compares parents: equal experts, tokenizers, chat templates, settings, licences."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.checkpoint.fingerprint import only_zeros, same_place, same_values
from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.checkpoint.peft import CONFIG
from frankenmoe.checkpoint.tensors import LowRank, Noise, TensorRef, TensorWrite
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import EVERY_NAME, FFN_ADAPTER, ExpertNode, down_names, strange_keys
from frankenmoe.planning.vocabulary import rows_warning

# bytes of a tensor that are compared in full when all sampled blocks are equal
COMPARE_LIMIT = 1 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# settings that an FFN was trained with and that the base now decides
INHERITED = ("rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "hidden_act")


def identical_groups(nodes: Sequence[ExpertNode]) -> list[list[int]]:
    """Groups of two or more experts with equal content, as lists of their indices."""
    groups: list[list[int]] = []
    for index, node in enumerate(nodes):
        home = next((group for group in groups if same_expert(nodes[group[0]], node)), None)
        if home is None:
            groups.append([index])
        else:
            home.append(index)
    return [group for group in groups if len(group) > 1]


def same_expert(one: ExpertNode, two: ExpertNode) -> bool:
    """Whether two experts hold the same numbers in every layer, whatever their sources are called.

    Of tensors larger than COMPARE_LIMIT only blocks are compared; see `compared_whole`.
    """
    return _outline(one) == _outline(two) and all(_same_content(*pair) for pair in _ref_pairs(one, two))


def adds_nothing(node: ExpertNode) -> bool:
    """Whether an expert puts out zero in every layer: all that it writes to the residual stream is stored zeros."""
    leaves = list(node.leaves())
    writes = [
        (write, suffix in leaf.loras[layer] or any(isinstance(step, Noise) for step in write.steps))
        for leaf in leaves
        for layer, row in leaf.ffn.items()
        for suffix, write in row.items()
        if suffix.startswith(down_names(leaf.source))
    ]
    # of most experts the first few numbers tell
    return bool(writes) and all(not more and all(map(only_zeros, write.sources)) for write, more in writes)


def spare_warnings(nodes: Sequence[ExpertNode], identical: Iterable[Sequence[int]], *, same: str) -> list[str]:
    """A sentence for every group of experts that are the `same`, and for every expert that adds nothing."""
    equal = [f"experts {', '.join(map(str, group))} are {same} and count as one for routing" for group in identical]
    zero = [f"the output of expert {node.name} is always zero" for node in nodes if adds_nothing(node)]
    return [f"{found}; `frankenmoe remove-expert` takes one out of a finished MoE" for found in (*equal, *zero)]


def compared_whole(one: ExpertNode, two: ExpertNode) -> bool:
    """Whether `same_expert` has compared every byte of two equal experts, and not just blocks of large tensors."""
    return all(
        _same_name(*pair) or pair[0].nbytes <= COMPARE_LIMIT or same_place(*pair) for pair in _ref_pairs(one, two)
    )


def one_for_all(nodes: Sequence[ExpertNode], identical: Iterable[Sequence[int]]) -> tuple[ExpertNode, ...]:
    """The experts, where those that are equal in every byte share the tensors of the first of them.

    `identical` are the groups found by comparing blocks; here their tensors are read completely.
    """
    found = list(nodes)
    for first, *others in identical:
        one = nodes[first]
        for index in others:
            pairs = [pair for pair in _ref_pairs(one, nodes[index]) if not _same_name(*pair)]
            if not one.children and all(same_values(*pair, limit=None) for pair in pairs):
                found[index] = replace(nodes[index], ffn=one.ffn, loras=one.loras)
    return tuple(found)


def _outline(node: ExpertNode) -> object:
    """Everything about an expert but its tensors: its nesting, and per matrix the steps and the adapter's scale."""
    ffn = [{suffix: _recipe(write) for suffix, write in row.items()} for row in node.ffn.values()]
    loras = [sorted((suffix, lora.scale) for suffix, lora in row.items()) for row in node.loras.values()]
    return node.top_k, ffn, loras, [_outline(child) for child in node.children]


def _recipe(write: TensorWrite) -> object:
    """How a tensor is computed, without the tensors it is computed from."""
    inputs = [_recipe(each) if isinstance(each, TensorWrite) else None for each in write.inputs]
    return inputs, [("low rank", step.scale) if isinstance(step, LowRank) else step for step in write.steps]


def _ref_pairs(one: ExpertNode, two: ExpertNode) -> Iterator[tuple[TensorRef, TensorRef]]:
    """The tensors that two experts of equal outline are made from, side by side."""
    for leaf, twin in zip(one.leaves(), two.leaves(), strict=True):
        yield from zip(_refs(leaf), _refs(twin), strict=True)


def _refs(leaf: ExpertNode) -> list[TensorRef]:
    rows, loras = leaf.ffn.values(), leaf.loras.values()
    written = [ref for row in rows for suffix in sorted(row) for ref in row[suffix].sources]
    return written + [ref for row in loras for suffix in sorted(row) for ref in (row[suffix].a, row[suffix].b)]


def _same_name(one: TensorRef, two: TensorRef) -> bool:
    # several experts may be parts of one tensor
    return (one.file, one.name, one.start) == (two.file, two.name, two.start)


def _same_content(one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors hold the same bytes. Without weights, only a tensor and itself do."""
    return _same_name(one, two) or (bool(one.nbytes and two.nbytes) and same_values(one, two, limit=COMPARE_LIMIT))


def source_warnings(base: Source, others: Iterable[Source]) -> list[str]:
    """A sentence for whatever of a source is not used: other weights, an adapter, settings that the base decides."""
    others = list(others)
    found = [note for source in (base, *others) for note in _unread(source)]
    found += [rows_warning(base, other) for other in others if other.own_rows is not None]
    ours = tokenizer_facts(base.folder)
    for other in others:
        theirs = tokenizer_facts(other.folder)
        for key in (key for key in ours if key in theirs and ours[key] != theirs[key]):
            found.append(
                f"{other.name} has another {key} than the base {base.name}; the base's is used, so its expert sees "
                "tokens it was not trained on"
                if key == "vocabulary"
                else f"{other.name} has another {key} than the base {base.name}; the base's is used"
            )
        for key in INHERITED:
            if key in base.config and key in other.config and base.config[key] != other.config[key]:
                found.append(
                    f"{other.name} was trained with {key} {other.config[key]}, the base has {base.config[key]}; "
                    "the base decides"
                )
    return found


def _unread(source: Source) -> Iterator[str]:
    yield from source.checkpoint.notes
    if source.adapter is None and (source.folder / CONFIG).is_file():
        yield (
            f"{source.name} also holds an adapter, which transformers would load and which is not used; an expert's "
            f"`adapter: {source.name}` uses it"
        )
    beyond = [key for key in strange_keys(source, EVERY_NAME) if not FFN_ADAPTER.search(key)]
    if source.adapter is not None and beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        yield (
            f"the adapter {source.adapter.folder} holds more than low-rank pairs, and of that an expert takes nothing: "
            f"{beyond[0]}{more}"
        )


def licence_warnings(sources: Iterable[Source]) -> list[str]:
    """A sentence if the sources and their adapters are under different licences, and one if some declare none."""
    found, sources = [], list(sources)
    declared = {str(source.name): licence(source.folder) for source in sources}
    adapters = [source.adapter.folder for source in sources if source.adapter is not None]
    declared |= {f"the adapter {folder}": licence(folder) for folder in adapters}
    named = {str(value) for value in declared.values() if value}
    if len(named) > 1:
        found.append(f"the sources are under different licences: {', '.join(sorted(named))}")
    silent = [name for name, value in declared.items() if value is None]
    if silent:
        found.append(f"no licence is declared in {', '.join(silent)}")
    return found


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """The facts by which tokenizers are compared: vocabulary, special tokens, chat template; only those that exist."""
    facts: dict[str, Any] = {}
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            facts["vocabulary"] = _vocabulary(folder / name)
            break
    settings = _json(folder / "tokenizer_config.json")
    for key in SPECIAL_TOKENS:
        value = settings.get(key)
        if settings:
            facts[key.replace("_", " ")] = value.get("content") if isinstance(value, dict) else value
    template = folder / "chat_template.jinja"
    if template.is_file():
        facts["chat template"] = small_bytes(template).decode(errors="replace")
    elif settings:
        facts["chat template"] = settings.get("chat_template")
    return facts


def _vocabulary(file: Path) -> str:
    """A digest of the token -> id table; of a SentencePiece file, a digest of the whole file."""
    raw = small_bytes(file)
    return _table_digest(raw) if file.suffix == ".json" else hashlib.blake2b(raw, digest_size=16).hexdigest()


@lru_cache(maxsize=4)  # parents mostly share one tokenizer file, and parsing ten megabytes takes a while
def _table_digest(raw: bytes) -> str:
    data = _parsed(raw)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    listed = data.get("added_tokens")
    tokens = (token for token in (listed if isinstance(listed, list) else []) if isinstance(token, dict))
    added = [(token.get("id"), token.get("content")) for token in tokens]
    return hashlib.blake2b(json.dumps([vocab, added], sort_keys=True).encode(), digest_size=16).hexdigest()


def _json(file: Path) -> dict[str, Any]:
    return _parsed(small_bytes(file)) if file.is_file() else {}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except ValueError:
        return {}


def licence(folder: Path) -> str | None:
    """The licence that a source's model card declares, as the hub spells it; None for none or `unknown`.

    A licence called `other` is given as "other (its own name)"; several are joined by commas.
    """
    head = card_head(folder)
    said = head.get("license")
    names = [name.strip().lower() for name in (said if isinstance(said, list) else [said]) if isinstance(name, str)]
    if names == ["other"] and isinstance(head.get("license_name"), str):
        return f"other ({head['license_name']})"
    return ", ".join(name for name in names if name not in ("", "unknown")) or None


def shared_licence(by_source: Sequence[str | None]) -> str | None:
    """The licence that all sources share; None if they differ, or if one is missing or unnamed."""
    found = set(by_source)
    (only, *others) = found or {None}
    if others or only is None or "," in only or (only == "other" and len(by_source) > 1):
        return None
    return only


def card_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a source's model card; empty if there is none or it cannot be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = small_bytes(card).decode("utf-8-sig", errors="replace")
    lines = text.splitlines()
    ends = [number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    if not ends or lines[0].strip() != "---":
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1 : ends[0]]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
