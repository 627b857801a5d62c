"""Whether a built folder splits text as its base does. If not, the base's is written as transformers loads it.

transformers chooses the class of a tokenizer by the model type of the config beside it, and that is another one for an
MoE. Only a tokenizer.json says everything itself.
"""

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from frankenmoe.build.target import Target
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.data.hardtext import hard_texts, token_ids
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.moe.dense import load_tokenizer

WHOLE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
FILES = frozenset({WHOLE, "tokenizer.model", "vocab.json", "vocab.txt"})
PLAIN_CLASS = "PreTrainedTokenizerFast"  # loads tokenizer.json as it is, in transformers 4 and 5
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_files(target: Target) -> dict[str, bytes]:
    """Name -> content of the tokenizer files that must replace the base's in a built folder; none if they are right.

    Raises ArtifactError if the base's tokenizer cannot be written so that transformers splits text alike.
    """
    base, rows = _base_tokenizer(target), target.rows
    if base is None:
        return {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(target.config), encoding="utf-8")
        for file in target.small_files:
            (folder / file.name).write_bytes(small_bytes(file))
        if (folder / WHOLE).is_file() and first_difference(base, folder, rows=rows) is None:
            return {}
        found = _written_out(base, folder, rows=rows)
        for file_name, raw in found.items():
            (folder / file_name).write_bytes(raw)
        odd = first_difference(base, folder, rows=rows)
        if odd is not None:
            raise ArtifactError(
                f"beside the MoE's config, the tokenizer of {target.base} splits {odd!r:.80} otherwise than "
                "beside the base's config",
                hint="save it with tokenizer.backend_tokenizer.save('tokenizer.json') beside the base's weights",
            )
        return found


def compared_texts(target: Target, folder: Path) -> int | None:
    """The number of hard texts that `folder` splits as the base does; None if the base has no tokenizer.

    Raises ArtifactError if it splits one otherwise.
    """
    base, rows = _base_tokenizer(target), target.rows
    if base is None:
        return None
    odd = first_difference(base, folder, rows=rows)
    if odd is not None:
        raise ArtifactError(
            f"the tokenizer of {folder} splits {odd!r:.80} otherwise than that of its base {target.base}",
            hint="build it again with this version",
        )
    return len(hard_texts(base, rows=rows))


def first_difference(base: Any, folder: Path, *, rows: int) -> str | None:
    """The first hard text that the tokenizer in `folder` splits otherwise than `base`; None if there is none."""
    try:
        other = load_tokenizer(folder)
    except SourceError:
        return hard_texts(base, rows=rows)[0]
    texts = hard_texts(base, rows=rows)
    pairs = zip(texts, token_ids(base, texts), token_ids(other, texts), strict=True)
    return next((text for text, ours, theirs in pairs if ours != theirs), None)


def _base_tokenizer(target: Target) -> Any:
    """The base's tokenizer; None if it has none that transformers can load by itself, or no class will load the MoE."""
    if target.config is None:
        return None
    if not any(file.name in FILES for file in target.small_files):
        return None
    with suppress(SourceError):
        return load_tokenizer(target.base)
    return None


def _written_out(tokenizer: Any, folder: Path, *, rows: int) -> dict[str, bytes]:
    """tokenizer.json, and the settings in `folder` with a class that takes that file as it is.

    Left out are tokens that the base's class adds behind the `rows` of the embedding, such as Qwen2's default for
    padding: no model can read them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return {}
    settings = json.loads((folder / SETTINGS).read_bytes()) if (folder / SETTINGS).is_file() else {}
    for key in SPECIAL:
        token = getattr(tokenizer, key)
        settings.setdefault(key, token if token and tokenizer.convert_tokens_to_ids(token) < rows else None)
    found = json.loads(backend.to_str())
    found["added_tokens"] = [token for token in found["added_tokens"] if token["id"] < rows]
    settings["tokenizer_class"] = PLAIN_CLASS
    return {
        WHOLE: (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode(),
        SETTINGS: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }
