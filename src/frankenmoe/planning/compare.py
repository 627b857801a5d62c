"""What a person should know about the parents before merging: equal experts, tokenizers, templates, licences."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.checkpoint.fingerprint import same_place, same_values
from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import ExpertNode

# how many bytes of one tensor are compared in full when every sampled block was equal
COMPARE_LIMIT = 1 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# settings of a parent that its FFN was trained under and that the base now decides
INHERITED = ("rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "hidden_act")


def identical_groups(nodes: Sequence[ExpertNode]) -> list[list[int]]:
    """Groups of two or more experts that compute the same by content, as lists of their numbers."""
    groups: list[list[int]] = []
    for index, node in enumerate(nodes):
        home = next((group for group in groups if same_expert(nodes[group[0]], node)), None)
        if home is None:
            groups.append([index])
        else:
            home.append(index)
    return [group for group in groups if len(group) > 1]


def same_expert(one: ExpertNode, two: ExpertNode) -> bool:
    """True where two experts hold the same numbers in every layer, whatever their sources are called."""
    if len(one.children) != len(two.children) or one.top_k != two.top_k:
        return False
    if one.children:
        return all(map(same_expert, one.children, two.children))
    return all(
        row.keys() == other.keys() and all(same_write(row[suffix], other[suffix]) for suffix in row)
        for row, other in zip(one.ffn, two.ffn, strict=True)
    ) and all(
        row.keys() == other.keys()
        and all(
            row[key].scale == other[key].scale
            and same_ref(row[key].a, other[key].a)
            and same_ref(row[key].b, other[key].b)
            for key in row
        )
        for row, other in zip(one.loras, two.loras, strict=True)
    )


def one_for_all(nodes: Sequence[ExpertNode], identical: Iterable[Sequence[int]]) -> tuple[ExpertNode, ...]:
    """The experts, where those of a group that are equal in every byte are all made from the tensors of its first.

    `identical` are groups that blocks of them have shown to be equal: the rest is read here, which only copies cost.
    """
    found = list(nodes)
    for first, *others in identical:
        one = nodes[first]
        for index in others:
            if not one.children and _same_bytes(one, nodes[index]):
                found[index] = replace(nodes[index], ffn=one.ffn, loras=one.loras)
    return tuple(found)


def _same_bytes(one: ExpertNode, two: ExpertNode) -> bool:
    pairs = zip(_refs(one), _refs(two), strict=True)
    others = [(ref, other) for ref, other in pairs if (ref.file, ref.name) != (other.file, other.name)]
    return all(same_values(ref, other, limit=None) for ref, other in others)


def compared_whole(one: ExpertNode, two: ExpertNode) -> bool:
    """True where `same_expert` has seen every byte of two equal experts, and not just blocks of larger tensors."""
    pairs = [
        (ref, other)
        for leaf, twin in zip(one.leaves(), two.leaves(), strict=True)
        for ref, other in zip(_refs(leaf), _refs(twin), strict=True)
    ]
    return all(
        (ref.file, ref.name) == (other.file, other.name) or ref.nbytes <= COMPARE_LIMIT or same_place(ref, other)
        for ref, other in pairs
    )


def _refs(leaf: ExpertNode) -> list[TensorRef]:
    """The tensors that an FFN is made from, in an order that equal experts share."""
    written = [ref for row in leaf.ffn for suffix in sorted(row) for ref in row[suffix].inputs]
    return written + [ref for row in leaf.loras for suffix in sorted(row) for ref in (row[suffix].a, row[suffix].b)]


def same_write(one: TensorWrite, two: TensorWrite) -> bool:
    """True where two writes give the same numbers: the same steps (noise has a seed of its own) on equal inputs."""
    return one.steps == two.steps and all(map(same_ref, one.inputs, two.inputs))


def same_ref(one: TensorRef, two: TensorRef) -> bool:
    """True where two references hold the same bytes; without weights, where they are the same tensor of one folder."""
    if (one.file, one.name) == (two.file, two.name):
        return True
    return bool(one.nbytes and two.nbytes) and same_values(one, two, limit=COMPARE_LIMIT)


def source_warnings(base: Source, others: Iterable[Source]) -> list[str]:
    """A sentence for every tokenizer, special token, chat template or inherited setting in which a parent differs."""
    found = []
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


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """What two tokenizers are compared by: vocabulary, special tokens, chat template; only what the folder has."""
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
        facts["chat template"] = template.read_text(encoding="utf-8", errors="replace")
    elif settings:
        facts["chat template"] = settings.get("chat_template")
    return facts


def _vocabulary(file: Path) -> str:
    """A digest of the token -> id table; of the whole file where it is SentencePiece's."""
    raw = file.read_bytes()
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
    return _parsed(file.read_bytes()) if file.is_file() else {}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except ValueError:
        return {}


def licence(folder: Path) -> str | None:
    """The licence that a source's model card declares, None where it declares none or `unknown`.

    By the hub's name for it; one without, which is called `other` there, as "other (its own name)"; several as a list.
    """
    head = card_head(folder)
    said = head.get("license")
    names = [name.strip().lower() for name in (said if isinstance(said, list) else [said]) if isinstance(name, str)]
    if names == ["other"] and isinstance(head.get("license_name"), str):
        return f"other ({head['license_name']})"
    return ", ".join(name for name in names if name not in ("", "unknown")) or None


def shared_licence(by_source: Sequence[str | None]) -> str | None:
    """The one licence that all sources are under; None where they differ, or one is silent or has no name for it."""
    found = set(by_source)
    (only, *others) = found or {None}
    if others or only is None or "," in only or (only == "other" and len(by_source) > 1):
        return None
    return only


def card_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a source's model card; empty where it has none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    lines = text.splitlines()
    ends = [number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    if not ends or lines[0].strip() != "---":
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1 : ends[0]]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
