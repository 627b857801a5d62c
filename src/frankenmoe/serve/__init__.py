"""A server with OpenAI's API for MoEs, dense models and GGUF files, and its page."""
