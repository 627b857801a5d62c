"""Plan + text -> the backbone with the lowest held-out loss, and what every candidate gave.

Candidates are measured one after another, each with its own expert forced. The closed ones come first; the best of them
then reads the text for RegMean.
"""

# what `auto` measures, from the simplest
CANDIDATES = (
    {"method": "base"},
    {"method": "average"},
    {"method": "task_arithmetic", "lambda": 0.7},
    {"method": "task_arithmetic", "lambda": 1.0},
    {"method": "ties", "density": 0.5},
    {"method": "regmean"},
)
