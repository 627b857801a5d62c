"""A Modelfile for Ollama beside a GGUF file: template, end tokens and parameters. Does not import torch.

Ollama's templates are of Go, those of checkpoints of Jinja. Most chat templates do the same simple thing: texts before,
between and behind the messages. These texts are found by rendering probes. They are used only if they give what the
Jinja template gives, for conversations of several lengths; any other template is refused.

Sources: template/template.go and parser/parser.go of Ollama (MIT licence) for what a template is given and how a
Modelfile is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.templates import OverLimitError, render
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.export.files import GgufFile
from frankenmoe.export.tokenizer import ENDS, Vocabulary
from frankenmoe.planning.files import GENERATION
from frankenmoe.planning.parts import Parts

SUFFIX = ".Modelfile"
PLAIN = "{{ .Prompt }}"  # of a model without a chat template, which continues the text
CONTEXT = 8192  # tokens at most: Ollama reserves memory for all of them
SYSTEM, USER, ASSISTANT, MORE = "Sy5tem", "U5er", "A5sistant", "M0re"  # unlike anything that a template writes
TALK = (
    ("user", "What is 2 + 2?"), ("assistant", "It is 4."), ("user", "And\n\n  twice \"that\", 'please'? {x}"),
    ("assistant", "8 \N{GRINNING FACE}"), ("user", "d'accord, à demain"), ("assistant", "Bye"), ("user", "Bye!"),
)  # fmt: skip
BRIEF = ("system", "You answer briefly.\nAlways.")
# generation_config.json -> PARAMETER
PARAMETERS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}  # in a string of Go's
HINT = "leave out --ollama, and write a Modelfile with a TEMPLATE by hand"

Turn = tuple[str, str]


@dataclass(frozen=True)
class Shape:
    """The texts around the messages of a conversation.

    `begin` is before the first user message; with a system message, `system` are the texts before and behind it
    instead. `reply` is between a user message and the reply to it, `turn` between a reply and the next message, `ask`
    behind the last message. `notes` are sentences for the user.
    """

    begin: str
    reply: str
    turn: str
    ask: str
    system: tuple[str, str] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def text(self, turns: Sequence[Turn]) -> str:
        """What the Go template writes for a conversation that ends with a user message."""
        said = dict(turns[:1]).get("system")
        before, behind = self.system or ("", "")
        parts = [self.begin if said is None else f"{before}{said}{behind}"]
        rest = [turn for turn in turns if turn[0] != "system"]
        for at, (role, content) in enumerate(rest):
            last = at == len(rest) - 1
            parts += [content, self.turn if role == "assistant" else self.ask if last else self.reply]
        return "".join(parts)

    def template(self) -> str:
        """The Go template."""
        begin = literal(self.begin)
        if self.system is not None:
            before, behind = map(literal, self.system)
            begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{begin}{{{{ end }}}}"
        last = "eq (len (slice $.Messages $i)) 1"
        ask, reply, turn = literal(self.ask), literal(self.reply), literal(self.turn)
        asked = reply if self.ask == self.reply else f"{{{{ if {last} }}}}{ask}{{{{ else }}}}{reply}{{{{ end }}}}"
        return (
            f'{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{asked}'
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not ({last}) }}}}{turn}{{{{ end }}}}'
            "{{ end }}{{ end }}"
        )


def shape_of(vocabulary: Vocabulary) -> Shape | None:
    """The shape of a vocabulary's chat template; None if it has none. PlanError if it is not of this kind."""
    if vocabulary.chat_template is None:
        return None
    first, _, rest = _render(vocabulary, [("user", USER)]).partition(USER)
    long = _render(vocabulary, [("user", USER), ("assistant", ASSISTANT), ("user", MORE)])
    begin, reply, turn, ask = _split(long, USER, ASSISTANT, MORE)
    if (first, rest) != (begin, ask):
        raise _refusal("it writes the first message of a long conversation otherwise than that of a short one")
    notes = []
    try:
        given = _render(vocabulary, [("system", SYSTEM), ("user", USER)])
        before, behind, _ = _split(given, SYSTEM, USER)
        system: tuple[str, str] | None = (before, behind)
    except OverLimitError:
        raise
    except SourceError:
        system = None
        notes.append("the chat template takes no system message, so Ollama leaves one out")
    shape = Shape(begin, reply, turn, ask, system)
    for length in range(1, len(TALK) + 1, 2):
        for turns in ([*TALK[:length]], *([[BRIEF, *TALK[:length]]] if system else [])):
            if _render(vocabulary, turns) != shape.text(turns):
                raise _refusal(f"it does more than put texts around the messages, such as with {len(turns)} of them")
    if _render(vocabulary, [("user", f" {USER} ")]) != shape.text([("user", f" {USER} ")]):
        notes.append("the chat template removes spaces around a message, Ollama does not")
    if "strftime_now" in vocabulary.chat_template:
        notes.append("the chat template writes the date, in Ollama that of this export")
    found = _without_bos(shape, vocabulary, notes)
    found.template()  # raises what a Modelfile cannot hold
    return found


def _without_bos(shape: Shape, vocabulary: Vocabulary, notes: list[str]) -> Shape:
    """The same shape without the begin token where llama.cpp writes it."""
    bos = vocabulary.tokens[vocabulary.special["bos"]] if vocabulary.add_bos else ""
    if not all(text.startswith(bos) for text in (shape.begin, *(shape.system or ())[:1])):
        notes.append("Ollama writes a begin token in front, the chat template does not")
    system = shape.system and (shape.system[0].removeprefix(bos), shape.system[1])
    return replace(shape, begin=shape.begin.removeprefix(bos), system=system, notes=tuple(notes))


def _render(vocabulary: Vocabulary, turns: Iterable[Turn]) -> str:
    """What the Jinja template gives for a conversation, up to where the reply begins."""
    assert vocabulary.chat_template is not None
    said = [{"role": role, "content": content} for role, content in turns]
    return render(vocabulary.chat_template, said, add_generation_prompt=True, **vocabulary.marks)


def _split(text: str, *marks: str) -> list[str]:
    """The parts of a text between marks that occur in it once and in this order. PlanError otherwise."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise _refusal("it leaves out a message, or writes one twice or in another place")
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _refusal(why: str) -> PlanError:
    return PlanError(f"the chat template cannot be translated for Ollama: {why}", hint=HINT)


def literal(text: str) -> str:
    """A text in a Go template: as a string of Go's where it would be read as code, or has characters that show nothing.

    PlanError for half a character.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _refusal(f"it writes {text!a}, which is not Unicode text")
    plain = all(letter.isprintable() or letter in "\n\t" for letter in text)
    # code follows, and would begin with a brace at the end of the text
    if plain and "{{" not in text and '"""' not in text and not text.endswith("{"):
        return text
    return f'{{{{ "{"".join(map(_escaped, text))}" }}}}'


def _escaped(letter: str) -> str:
    """A character in a string of Go's."""
    return ESCAPES.get(letter) or (letter if letter.isprintable() else f"\\U{ord(letter):08x}")


def write_modelfiles(files: Sequence[GgufFile], shape: Shape | None, vocabulary: Vocabulary, model: Parts) -> None:
    """Writes NAME.Modelfile beside every NAME.gguf."""
    context = int(model.config["max_position_embeddings"])
    for file in files:
        text = modelfile(file.path.name, shape, vocabulary, folder=model.folder, context=context)
        write_atomic(modelfile_of(file.path), text.encode())


def modelfile_of(file: Path) -> Path:
    """The Modelfile of a GGUF file."""
    return file.with_suffix(SUFFIX)


def ollama_name(file: Path) -> str:
    """A name for the model of a GGUF file that Ollama takes: small letters, digits, and few other characters."""
    return re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-._") or "moe"


def modelfile(file: str, shape: Shape | None, vocabulary: Vocabulary, *, folder: Path, context: int) -> str:
    """The text of a Modelfile for the GGUF file of that name beside it.

    `folder` holds generation_config.json, `context` is the longest input that the model was made for, in tokens.
    """
    template = PLAIN if shape is None else shape.template()
    ends = dict.fromkeys(vocabulary.tokens[vocabulary.special[end]] for end in ENDS if end in vocabulary.special)
    lines = [f"FROM {_value(f'./{file}')}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {_value(end)}" for end in ends if end]
    lines += [f"PARAMETER num_ctx {min(context, CONTEXT)}", *_parameters(folder / GENERATION)]
    return "\n".join(lines) + "\n"


def _parameters(file: Path) -> Iterator[str]:
    """Lines for how replies are sampled, as generation_config.json says; greedy if it says so."""
    if not file.is_file():
        return
    settings: Mapping[str, Any] = read_object(file, hint="fetch the file again")
    if settings.get("do_sample") is False:
        yield "PARAMETER temperature 0"
    elif settings.get("do_sample"):
        for key, name in PARAMETERS.items():
            value = settings.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"PARAMETER {name} {value if isinstance(value, int) else f'{value:g}'}"


def _value(text: str) -> str:
    """A value in a Modelfile, quoted where it must be: there are no escapes."""
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"' if text != text.strip() or " " in text or text[:1] == "#" else text
