"""Whether llama.cpp will split text as the source does, found without the weights.

A file with the vocabulary of the real one and one tiny random layer is enough: seconds, for a model of any size.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frankenmoe.export.check import same_tokens
from frankenmoe.export.llama import Engine
from frankenmoe.export.small import CONTEXT, write_small
from frankenmoe.export.tokenizer import Vocabulary


def split_otherwise(vocabulary: Vocabulary, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts that llama.cpp splits into other tokens than a transformers tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.gguf"
        write_small(file, vocabulary)
        engine = Engine(file, context=CONTEXT, threads=1)
        front = vocabulary.front
        return [text for text in prompts if not same_tokens(engine, front + text, tokenizer(text)["input_ids"])]
