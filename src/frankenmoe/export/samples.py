"""Default texts for comparing a file with its source, written for this project."""

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "2 + 2 = 4, and 3 + 5 =",
    "Il était une fois",
    "To be, or not to be",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox jumps over the lazy dog; it's 10% faster than we've seen in 2024!",
)
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening at six. He trimmed the wick, polished the glass and wrote "
    "the weather into a book that nobody would read. When the fog came in, he rang the bell until his arms hurt.\n\n"
    "One night a boat answered. It was small and grey, and a woman stood in it who asked him for the way home.",
    "import json\nfrom pathlib import Path\n\n\ndef load_settings(path: Path) -> dict:\n"
    '    """Reads the settings file, or returns the defaults if there is none."""\n'
    "    if not path.exists():\n        return {}\n    with path.open() as file:\n        return json.load(file)\n\n\n"
    "class Counter:\n    def __init__(self):\n        self.total = 0\n\n    def add(self, value):\n"
    "        self.total += value\n        return self.total\n",
    "Let n be a positive integer. If n is even, then n = 2k for some integer k, and so n^2 = 4k^2 is divisible by 4. "
    "If n is odd, then n = 2k + 1, and n^2 = 4k^2 + 4k + 1 leaves the remainder 1. A train leaves at 9:15 and travels "
    "180 km in 2.5 hours; its average speed is 180 / 2.5 = 72 km/h.",
    "Le matin, la vieille dame ouvrait sa fenêtre et regardait la rue. Elle saluait le boulanger, le facteur et les "
    "enfants qui couraient vers l'école. Puis elle préparait son café, très noir, et lisait le journal de la veille.",
)
