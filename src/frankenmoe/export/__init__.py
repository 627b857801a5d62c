"""An MoE -> GGUF files that llama.cpp runs: names, tokenizer, quantization and proof; imports no other stage."""
