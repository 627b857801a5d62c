"""The mark of each expert: a colour, a pattern and a label.

Eight colours that colour-blind people can distinguish, times eight patterns. Every mark also has a label.
"""

from dataclasses import dataclass

# Okabe and Ito's palette (Color Universal Design, 2008), its black left out and grey in its place
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
PATTERNS = ("plain", "rising", "falling", "level", "upright", "dotted", "crossed", "edged")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ@#"
DROPPED = "-"  # a choice that reached no expert
BEYOND = "+"  # experts after the last digit, which only their names distinguish
DARK, LIGHT = "#000000", "#FFFFFF"


@dataclass(frozen=True, slots=True)
class Mark:
    """The mark of one expert. `ink` is the best text colour on `colour`; `digit` is unique for 64 experts."""

    colour: str
    ink: str
    pattern: str
    digit: str


def mark(expert: int) -> Mark:
    """The mark of an expert by its number; of a dropped choice (-1) a grey dash. Unique for the first 64."""
    if expert < 0:
        return Mark(colour=COLOURS[-1], ink=DARK, pattern="plain", digit=DROPPED)
    colour = COLOURS[expert % len(COLOURS)]
    return Mark(
        colour=colour,
        ink=max((DARK, LIGHT), key=lambda ink: contrast(ink, colour)),
        pattern=PATTERNS[expert // len(COLOURS) % len(PATTERNS)],
        digit=DIGITS[expert] if expert < len(DIGITS) else BEYOND,
    )


def contrast(one: str, two: str) -> float:
    """The contrast ratio of two colours (#rrggbb), 1 to 21, as WCAG 2.2 defines it."""
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2)."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
