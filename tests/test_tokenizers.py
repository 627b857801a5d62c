"""A built folder splits text as its base does, whatever files the base's tokenizer is in."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.build.proof import verify
from frankenmoe.data.hardtext import hard_texts, token_ids
from frankenmoe.errors import ArtifactError


def parents(folder: Path, tokenizer: Any, **settings: Any) -> list[Path]:
    """Two llamas whose folders hold only what `write` leaves of a tokenizer."""
    sizes = {"vocab_size": len(tokenizer) + 8, "bos_token_id": 1, "eos_token_id": 2}
    return [tiny.make_parent(folder / str(seed), seed=seed, **sizes, **settings) for seed in range(2)]


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def as_two_files(folder: Path, tokenizer: Any) -> None:
    """vocab.json and merges.txt, as GPT-2 and older Qwens have them."""
    without_tokenizer(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )


def as_sentencepiece(folder: Path, tokenizer: Any) -> None:
    """tokenizer.model alone, as Llama 2 had it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    without_tokenizer(folder)
    text = folder / "text.txt"
    text.write_text(gguftools.WORDS * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=len(tokenizer), model_type="bpe",
        byte_fallback=True, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False, "add_bos_token": True}))


def same_ids(one: Path, two: Path) -> bool:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (one, two))
    texts = hard_texts(ours, rows=len(ours))
    return token_ids(ours, texts) == token_ids(theirs, texts)


@pytest.mark.parametrize("write", [as_two_files, as_sentencepiece])
def test_a_tokenizer_in_other_files_is_written_as_one(write: Any, tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        write(folder, tokenizer)
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", folders[0], folders), tmp_path / "out").folder
    assert (built / "tokenizer.json").is_file()
    assert same_ids(folders[0], built)
    assert [check for check in verify(built) if check.what == "tokenizer"]


def test_a_class_that_depends_on_the_model_type(tmp_path: Path) -> None:
    """A Llama class without a class in the folder: beside a Mixtral config another one would be chosen."""
    tokenizer = gguftools.sentencepiece()
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", folders[0], folders), tmp_path / "out").folder
    assert same_ids(folders[0], built)


def test_a_tokenizer_that_is_right_is_copied_unchanged(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("llama-bpe", bos=True)
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        tokenizer.save_pretrained(folder)
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", folders[0], folders), tmp_path / "out").folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (built / name).read_bytes() == (folders[0] / name).read_bytes()


def test_verify_notices_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        tokenizer.save_pretrained(folder)
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", folders[0], folders), tmp_path / "out").folder
    gguftools.bpe("smollm").save_pretrained(built)
    record = json.loads((built / "frankenmoe.json").read_text())
    from frankenmoe.artifact.folder import small_hashes

    record["files"] = small_hashes(built)
    (built / "frankenmoe.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"splits .* otherwise than that of its base"):
        verify(built)
