"""Generates four kinds of text from seeded templates, without a network. Does not import torch.

A domain is a few functions from a random generator to one document without blank lines. Each has rules that a tiny
model can learn from little text: correct sums, repeated variables, ingredients that are used, lines that rhyme. It also
has so many free choices that two seeds do not give the same document.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

HELD_OUT_CHARACTERS = 8_000
PROMPTS_PER_DOMAIN = 8
PROMPT_CHARACTERS = 120


def generate(domain: str, *, seed: int, characters: int) -> str:
    """Whole documents of `domain` with blank lines between them: as few as reach `characters` characters.

    The same arguments give the same text on every machine, and a longer text begins with the shorter one.
    KeyError for a name not in `DOMAINS`.
    """
    return _collect(_documents(domain, stream=f"train {seed}"), characters=characters)


def held_out(domain: str) -> str:
    """About 8,000 characters of `domain` that no seed of `generate` gives. KeyError for an unknown domain."""
    return _collect(_documents(domain, stream="held out"), characters=HELD_OUT_CHARACTERS)


def prompts(domain: str) -> tuple[str, ...]:
    """Eight openings of other documents of `domain`, at most 120 characters each. KeyError for an unknown domain."""
    openings = islice(_documents(domain, stream="prompts"), PROMPTS_PER_DOMAIN)
    return tuple(document[:PROMPT_CHARACTERS].rsplit(maxsplit=1)[0] for document in openings)


def _documents(domain: str, *, stream: str) -> Iterator[str]:
    writers = _WRITERS[domain]
    rng = Random(f"frankenmoe {domain} {stream}")  # Python hashes a string seed with SHA-512, the same on every machine
    while True:
        yield rng.choice(writers)(rng)


def _collect(documents: Iterator[str], *, characters: int) -> str:
    collected: list[str] = []
    length = 0
    while length - 1 < characters:  # the last document ends with a newline, not a blank line
        collected.append(next(documents))
        length += len(collected[-1]) + 2
    return "\n\n".join(collected) + "\n"


def _pick(rng: Random, words: str) -> str:
    return rng.choice(words.split())


def _pick_two(rng: Random, words: str) -> tuple[str, str]:
    first, second = rng.sample(words.split(), 2)
    return first, second


# ---- maths: word problems with every step of the solution ------------------------------------------------------------

_PEOPLE = (
    "Ada Ben Carla Dev Elif Farid Greta Hugo Ines Jonas Kemi Leo Mona Nadia Omar Priya Quinn Rosa Sami Tara Umar Vera "
    "Wim Yuki Zoe"
)
_GOODS = (
    "apples pencils marbles stamps stickers shells books cards buttons tickets coins beads postcards candles balloons "
    "plums walnuts ribbons"
)
_CONTAINERS = "boxes bags baskets jars crates drawers packets trays"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_VEHICLES = "train bus lorry cyclist tram ferry van rider"


def _gain_and_loss(rng: Random) -> tuple[str, str]:
    (who, other), goods, (first_day, second_day) = _pick_two(rng, _PEOPLE), _pick(rng, _GOODS), _pick_two(rng, _DAYS)
    start, more = rng.randint(11, 89), rng.randint(11, 89)
    less = rng.randint(3, start + more - 1)
    return (
        f"{who} finds {start} {goods} on {first_day} and {more} {goods} on {second_day}, then gives {less} to {other}. "
        f"How many {goods} does {who} have left?",
        f"{start} + {more} = {start + more}. {start + more} - {less} = {start + more - less}. "
        f"{who} has {start + more - less} {goods} left.",
    )


def _full_containers(rng: Random) -> tuple[str, str]:
    who, goods, containers = _pick(rng, _PEOPLE), _pick(rng, _GOODS), _pick(rng, _CONTAINERS)
    count, each, loose = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 30)
    return (
        f"{who} fills {count} {containers} with {each} {goods} each and keeps {loose} {goods} on the table. "
        f"How many {goods} are there in all?",
        f"{count} * {each} = {count * each}. {count * each} + {loose} = {count * each + loose}. "
        f"There are {count * each + loose} {goods} in all.",
    )


def _fair_shares(rng: Random) -> tuple[str, str]:
    (who, other), goods = _pick_two(rng, _PEOPLE), _pick(rng, _GOODS)
    friends, each, eaten = rng.randint(2, 12), rng.randint(3, 12), rng.randint(2, 20)
    total = friends * each + eaten
    return (
        f"{who} and {other} bring {total} {goods} to school and lose {eaten} on the way. "
        f"{friends} friends share the rest equally. How many {goods} does each friend get?",
        f"{total} - {eaten} = {friends * each}. {friends * each} / {friends} = {each}. "
        f"Each friend gets {each} {goods}.",
    )


def _change(rng: Random) -> tuple[str, str]:
    who, goods, day = _pick(rng, _PEOPLE), _pick(rng, _GOODS), _pick(rng, _DAYS)
    count, price = rng.randint(2, 12), rng.randint(2, 12)
    cost = count * price
    paid = cost + rng.randint(1, 40)
    return (
        f"On {day} {who} buys {count} {goods} at {price} dollars each and pays with {paid} dollars. "
        f"How much change does {who} get?",
        f"{count} * {price} = {cost}. {paid} - {cost} = {paid - cost}. "
        f"{who} has the {goods} and {paid - cost} dollars.",
    )


def _journey(rng: Random) -> tuple[str, str]:
    vehicle, day = _pick(rng, _VEHICLES), _pick(rng, _DAYS)
    speed, hours, extra = rng.randint(2, 12) * 5, rng.randint(2, 9), rng.randint(3, 40)
    way = speed * hours
    return (
        f"A {vehicle} leaves on {day} and goes {speed} miles an hour for {hours} hours, then {extra} miles more. "
        f"How far does the {vehicle} go?",
        f"{speed} * {hours} = {way}. {way} + {extra} = {way + extra}. The {vehicle} goes {way + extra} miles.",
    )


def _comparison(rng: Random) -> tuple[str, str]:
    (who, other), goods = _pick_two(rng, _PEOPLE), _pick(rng, _GOODS)
    few, difference = rng.randint(5, 60), rng.randint(3, 40)
    many = few + difference
    return (
        f"{who} has {few} {goods}. {other} has {difference} more {goods} than {who}. "
        f"How many {goods} do {who} and {other} have together?",
        f"{few} + {difference} = {many}. {few} + {many} = {few + many}. Together they have {few + many} {goods}.",
    )


_PROBLEMS = (_gain_and_loss, _full_containers, _fair_shares, _change, _journey, _comparison)


def _write_problem(rng: Random) -> str:
    question, answer = rng.choice(_PROBLEMS)(rng)
    return f"Question: {question}\nAnswer: {answer}"


# ---- python: small functions that do what their docstring says -------------------------------------------------------

_NOUNS = (
    "price score weight height value point angle speed length digit level count depth amount reading total sample "
    "offset width grade"
)
_REPORTS = "orders players parcels sensors pupils tickets devices matches samples rivers books streets"


def _condition(rng: Random, name: str) -> tuple[str, str, str]:
    """A condition on the variable `name`: in a function's name, in prose and in code."""
    low = rng.randint(2, 99)
    high = low + rng.randint(5, 50)
    return rng.choice(
        (
            ("large", f"above {low}", f"{name} > {low}"),
            ("small", f"below {low}", f"{name} < {low}"),
            ("other", f"not equal to {low}", f"{name} != {low}"),
            ("middle", f"between {low} and {high}", f"{low} <= {name} <= {high}"),
            ("multiple", f"divisible by {low}", f"{name} % {low} == 0"),
        )
    )


def _sum_function(rng: Random) -> str:
    noun = _pick(rng, _NOUNS)
    label, prose, code = _condition(rng, noun)
    factor = rng.randint(2, 99)
    return f'''def sum_{label}_{noun}s({noun}s):
    """Return {factor} times the sum of the {noun}s that are {prose}."""
    result = 0
    for {noun} in {noun}s:
        if {code}:
            result += {factor} * {noun}
    return result'''


def _list_function(rng: Random) -> str:
    noun, report = _pick(rng, _NOUNS), _pick(rng, _REPORTS)
    label, prose, code = _condition(rng, noun)
    shift = rng.randint(2, 99)
    return f'''def list_{label}_{noun}s({report}):
    """List every {noun} in {report} that is {prose}, plus {shift}."""
    {noun}s = [item.{noun} for item in {report}]
    return [{noun} + {shift} for {noun} in {noun}s if {code}]'''


def _count_function(rng: Random) -> str:
    noun, report = _pick(rng, _NOUNS), _pick(rng, _REPORTS)
    step = rng.randint(2, 999)
    return f'''def count_{report}_by_{noun}({report}, step={step}):
    """Count the {report} in each range of {step} by their {noun}."""
    counts = {{}}
    for item in {report}:
        key = item["{noun}"] // step
        counts[key] = counts.get(key, 0) + 1
    return counts'''


def _check_function(rng: Random) -> str:
    noun, report = _pick(rng, _NOUNS), _pick(rng, _REPORTS)
    (label, prose, code), error = _condition(rng, noun), rng.randint(100, 999)
    return f'''def check_{label}_{noun}({noun}):
    """Raise error {error} if the {noun} of the {report} is not {prose}."""
    if not {code}:
        raise ValueError(f"error {error}: {noun} of {report} must be {prose}, got {{{noun}}}")
    return {noun}'''


def _first_function(rng: Random) -> str:
    noun, report = _pick(rng, _NOUNS), _pick(rng, _REPORTS)
    (label, prose, code), default = _condition(rng, noun), rng.randint(2, 99)
    return f'''def first_{label}_{noun}({report}, default={default}):
    """Return the first {noun} in {report} that is {prose}, or default."""
    for item in {report}:
        {noun} = item.{noun}
        if {code}:
            return {noun}
    return default'''


def _record_class(rng: Random) -> str:
    (first, second), report = _pick_two(rng, _NOUNS), _pick(rng, _REPORTS)
    factor, shift = rng.randint(2, 99), rng.randint(2, 99)
    return f'''class {first.title()}{second.title()}:
    """Hold the {first} and the {second} of one of the {report}."""
    def __init__(self, {first}, {second}={shift}):
        self.{first} = {first}
        self.{second} = {second}
    def scaled(self, factor={factor}):
        """Return factor times the {first}, less the {second}, plus {factor + shift}."""
        return factor * self.{first} - self.{second} + {factor + shift}'''


_PROGRAMS = (_sum_function, _list_function, _count_function, _check_function, _first_function, _record_class)


# ---- recipes: every listed ingredient is used ------------------------------------------------------------------------

_VEGETABLES = (
    "carrots leeks onions potatoes parsnips peppers tomatoes mushrooms courgettes beetroots turnips shallots radishes "
    "aubergines"
)
_GRAINS = "rice barley lentils chickpeas noodles couscous millet quinoa buckwheat beans"
_HERBS = "thyme parsley basil rosemary coriander dill sage mint oregano tarragon chives"
_SPICES = "cumin paprika nutmeg turmeric cinnamon ginger cardamom fennel saffron cloves"
_FRUITS = "apple pear plum cherry apricot lemon orange peach raspberry blueberry quince fig"
_NUTS = "almonds hazelnuts walnuts pistachios pecans cashews"
_FATS = "butter oil ghee lard margarine"
_MOODS = "Warm Rustic Quick Creamy Spicy Light Hearty Golden Simple Festive"
_CUTS = "chop slice dice peel grate quarter"
_SIDES = "bread yoghurt toast flatbread crackers cream cheese"


def _soup(rng: Random) -> str:
    first, second = _pick_two(rng, _VEGETABLES)
    herb, spice, fat = _pick(rng, _HERBS), _pick(rng, _SPICES), _pick(rng, _FATS)
    cut, other_cut = _pick_two(rng, _CUTS)
    return (
        f"{_pick(rng, _MOODS)} soup of {first} and {second} for {rng.randint(2, 8)}\n"
        f"You need {rng.randint(2, 9)} {first}, {rng.randint(2, 9)} {second}, {fat}, {spice} and {herb}.\n"
        f"{cut.title()} the {first} and {other_cut} the {second} while the {fat} melts slowly in a deep pan. "
        f"Stir in the {first} and the {spice}, and fry gently for {rng.randint(3, 14)} minutes until soft. "
        f"Add the {second}, cover with water, and simmer for {rng.randint(15, 45)} minutes. "
        f"Season with salt and {herb}, and serve hot with {_pick(rng, _SIDES)}."
    )


def _bake(rng: Random) -> str:
    vegetable, grain, herb = _pick(rng, _VEGETABLES), _pick(rng, _GRAINS), _pick(rng, _HERBS)
    fat, spice, grams = _pick(rng, _FATS), _pick(rng, _SPICES), rng.randint(4, 20) * 25
    return (
        f"{_pick(rng, _MOODS)} bake of {vegetable} and {grain} for {rng.randint(2, 8)}\n"
        f"You need {grams} grams of {grain}, {rng.randint(2, 9)} {vegetable}, {spice}, {herb} and {fat}.\n"
        f"Heat the oven to {rng.randint(16, 23) * 10} degrees and grease a wide dish with {fat}. "
        f"Boil the {grain} in salted water for {rng.randint(8, 30)} minutes, then drain well. "
        f"{_pick(rng, _CUTS).title()} the {vegetable}, toss with the {spice}, and spread over the {grain}. "
        f"Bake for {rng.randint(20, 55)} minutes, scatter with {herb}, and serve with {_pick(rng, _SIDES)}."
    )


def _salad(rng: Random) -> str:
    vegetable, grain, nuts = _pick(rng, _VEGETABLES), _pick(rng, _GRAINS), _pick(rng, _NUTS)
    herb, fruit, grams = _pick(rng, _HERBS), _pick(rng, _FRUITS), rng.randint(4, 20) * 25
    return (
        f"{_pick(rng, _MOODS)} salad of {grain} and {vegetable} for {rng.randint(2, 8)}\n"
        f"You need {grams} grams of {grain}, {rng.randint(2, 9)} {vegetable}, {nuts}, {fruit} juice and {herb}.\n"
        f"Rinse the {grain}, cook for {rng.randint(8, 30)} minutes, and leave to cool in a large bowl. "
        f"{_pick(rng, _CUTS).title()} the {vegetable} and toast the {nuts} for {rng.randint(2, 9)} minutes. "
        f"Mix the {vegetable} with the {grain} and the {fruit} juice, and rest for {rng.randint(5, 40)} minutes. "
        f"Top with the {nuts} and the {herb}, and serve cold with {_pick(rng, _SIDES)}."
    )


def _cake(rng: Random) -> str:
    fruit, nuts, spice, fat = _pick(rng, _FRUITS), _pick(rng, _NUTS), _pick(rng, _SPICES), _pick(rng, _FATS)
    flour, sugar = rng.randint(6, 16) * 25, rng.randint(4, 12) * 25
    return (
        f"{_pick(rng, _MOODS)} cake of {fruit} and {nuts} for {rng.randint(4, 12)}\n"
        f"You need {flour} grams of flour, {sugar} grams of sugar, eggs, {fat}, {fruit}, {nuts} and {spice}.\n"
        f"Heat the oven to {rng.randint(15, 20) * 10} degrees and line a round tin with paper. "
        f"Beat the {fat} with the sugar for {rng.randint(3, 9)} minutes, then add {rng.randint(2, 6)} eggs one by one. "
        f"Fold in the flour, the {spice} and the {nuts}, and press the {fruit} into the top. "
        f"Bake for {rng.randint(25, 60)} minutes, cool in the tin, and serve with {_pick(rng, _SIDES)}."
    )


_DISHES = (_soup, _bake, _salad, _cake)


# ---- verse: couplets whose lines rhyme -------------------------------------------------------------------------------

_RHYMES = {  # qualities -> a family of rhymes
    "silver holy": "night light sight flight knight",
    "stormy salty": "sea tree bee key quay",
    "dusty rolling": "rain lane grain chain plain train",
    "hollow ancient": "stone bone throne tone drone",
    "golden early": "day bay clay ray spray hay",
    "windy lonely": "hill mill quill rill sill",
    "solemn mossy": "ground sound hound mound",
    "burning noble": "flame name game frame",
    "distant wooden": "star scar guitar jar",
    "merry royal": "wing spring ring king string",
    "barren foreign": "hand land sand strand band",
    "magic mellow": "bell shell well spell dell",
    "crimson leafy": "tower flower shower bower",
    "heavy rusty": "door shore floor oar",
    "frozen pallid": "snow crow glow foe",
    "tender faithful": "heart cart dart chart",
}
_MOTIONS = {
    "swallow": "circles flutters",
    "shepherd": "wanders whistles",
    "sparrow": "chirrups nestles",
    "sailor": "journeys labours",
    "maiden": "blushes listens",
    "poet": "ponders murmurs",
    "raven": "hovers croaks",
    "pilgrim": "kneels travels",
    "lover": "lingers trembles",
    "widow": "sorrows slumbers",
    "hunter": "crouches gallops",
    "minstrel": "carols dances",
}
_PLACES = "beside beneath beyond behind above before"
_LINES = (
    "The {mood} {being} {motion} {place} the {quality} {rhyme}",
    "O {mood} {being}, come and bless the {quality} {rhyme}",
    "And no {mood} {being} shall forget the {quality} {rhyme}",
    "Where once a {being} {motion} {place} the {quality} {rhyme}",
    "When every {being} {motion} for the {quality} {rhyme}",
    "Yet still the {being} {motion} {place} thy {quality} {rhyme}",
)


def _verse_line(rng: Random, *, qualities: str, rhyme: str) -> str:
    being, motions = rng.choice(list(_MOTIONS.items()))
    return rng.choice(_LINES).format(
        being=being,
        motion=_pick(rng, motions),
        mood=_pick(rng, "gentle weary silent broken fading restless quiet bitter"),
        place=_pick(rng, _PLACES),
        quality=_pick(rng, qualities),
        rhyme=rhyme,
    )


def _write_poem(rng: Random) -> str:
    couplets = []
    for qualities, family in rng.sample(list(_RHYMES.items()), rng.randint(2, 4)):
        lines = [_verse_line(rng, qualities=qualities, rhyme=rhyme) for rhyme in _pick_two(rng, family)]
        couplets.append(",\n".join(lines) + ".")
    return "\n".join(couplets)


_WRITERS: dict[str, tuple[Callable[[Random], str], ...]] = {
    "maths": (_write_problem,),
    "python": _PROGRAMS,
    "recipes": _DISHES,
    "verse": (_write_poem,),
}
DOMAINS = tuple(_WRITERS)
