"""A GGUF file of a tiny model: all that llama.cpp needs to try a vocabulary or a chat template."""

from pathlib import Path

import gguf
import numpy as np

from frankenmoe.export.head import write_vocabulary
from frankenmoe.export.tokenizer import Vocabulary

HIDDEN, FFN, CONTEXT = 32, 32, 512
MATRICES = {"attn_q": HIDDEN, "attn_k": HIDDEN, "attn_v": HIDDEN, "attn_output": HIDDEN, "ffn_gate": FFN, "ffn_up": FFN}


def write_small(file: Path, vocabulary: Vocabulary) -> None:
    """A llama of one layer with random weights, in which every token has another effect."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    write_vocabulary(writer, vocabulary)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))

    add("token_embd", len(vocabulary.tokens), HIDDEN)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        add(name, HIDDEN)
    for name, rows in MATRICES.items():
        add(f"blk.0.{name}", rows, HIDDEN)
    add("blk.0.ffn_down", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
