"""How messages and reports write a count and its noun."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 expert`, `3 experts`, `12,000 tokens`. `plural` is by default the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
