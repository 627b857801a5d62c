"""Rows of JSON files and datasets -> documents: texts, conversations, and pairs of a question and its answer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from frankenmoe.errors import SourceError

# speakers in ShareGPT files and in chat `messages`, in small letters -> role
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user", "prompter", "input", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "bot", "ai", "output"), "assistant"),
    **dict.fromkeys(("function_call", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# columns of a conversation -> the keys of speaker and text in its turns
CONVERSATIONS = {"conversations": ("from", "value"), "messages": ("role", "content"), "conversation": ("from", "value")}
# columns of a question, of what is added to it, and of its answer
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "input", "response"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("query", None, "response"),
)
PROMPT, COMPLETION = "prompt", "completion"
CALLS = "tool_calls"
PASSED = ("name", "tool_call_id", "reasoning_content", "thinking")  # keys of a turn that templates may read


class Turn(TypedDict):
    """One message, as chat templates take it; `role` is system, user, assistant or tool."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]


@dataclass(frozen=True)
class Document:
    """Either a text or a conversation of `turns`. `closed` is False if the next document continues this one.

    Of a text, what follows the first `given` characters is to be learned. A `plain` conversation can be written without
    a chat template. `tools` are described to the template.
    """

    text: str = ""
    turns: tuple[Turn, ...] = ()
    closed: bool = True
    given: int = 0
    plain: bool = False
    tools: tuple[dict[str, Any], ...] = ()


def document(row: Any, *, where: str) -> Document:
    """The document of a row. Raises SourceError, which names the place and the columns, for anything else."""
    if not isinstance(row, Mapping):
        raise SourceError(
            f"{where} is a JSON {type(row).__name__}, expected an object", hint='write {"text": "..."} on the line'
        )
    if isinstance(row.get("text"), str):
        return Document(text=whole(row["text"], where=where))
    for key, (speaker, said) in CONVERSATIONS.items():
        if _is_list(row.get(key)):
            turns = _turns(row[key], speaker=speaker, said=said, where=f"{where}, {key}")
            return Document(turns=_with_system(row, turns, where=where), tools=_tools(row, where=where))
    found = _completion(row, where=where) or _pair(row, where=where)
    if found is not None:
        return found
    empty = [key for key in ("text", *CONVERSATIONS, *(each[0] for each in PAIRS)) if key in row and row[key] is None]
    if empty:
        raise SourceError(f"{where} has nothing in {empty[0]} (null)", hint="remove that row")
    raise SourceError(
        f"{where} has neither `text` nor `conversations` nor `messages`, nor a question with its answer; found "
        f"{', '.join(map(str, row))[:200] or 'no keys'}",
        hint="rename the column that holds the text to `text`",
    )


def whole(text: str, *, where: str) -> str:
    """The same text. Raises SourceError for half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where} holds half a character, \\u{ord(text[error.start]):04x} without its other half",
            hint="the text is truncated there: repair or remove it",
        ) from error
    return text


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _completion(row: Mapping[str, Any], *, where: str) -> Document | None:
    """TRL's prompt and completion: one text after the other, or two lists of messages."""
    prompt, answer = row.get(PROMPT), row.get(COMPLETION)
    if isinstance(prompt, str) and isinstance(answer, str):
        _need_answer(answer, where=where, key=COMPLETION)
        return Document(text=whole(prompt + answer, where=where), given=len(prompt))
    if _is_list(prompt) and _is_list(answer):
        entries = [*(prompt or ()), *(answer or ())]
        turns = _turns(entries, speaker="role", said="content", where=f"{where}, {PROMPT} and {COMPLETION}")
        return Document(turns=turns, tools=_tools(row, where=where))
    return None


def _pair(row: Mapping[str, Any], *, where: str) -> Document | None:
    """A question and its answer, as in Alpaca's rows."""
    for asked, added, answered in PAIRS:
        if not isinstance(row.get(asked), str) or not isinstance(row.get(answered), str):
            continue
        more = row.get(added) if added else None
        question = "\n\n".join(part for part in (row[asked], more) if isinstance(part, str) and part.strip())
        _need_answer(row[answered], where=where, key=answered)
        turns = (
            Turn(role="user", content=whole(question, where=where)),
            Turn(role="assistant", content=whole(row[answered], where=where)),
        )
        return Document(turns=_with_system(row, turns, where=where), plain=True)
    return None


def _need_answer(text: str, *, where: str, key: str) -> None:
    if not text.strip():
        raise SourceError(f"{where} has an empty {key}, so nothing can be learnt from it", hint="remove that row")


def _with_system(row: Mapping[str, Any], turns: tuple[Turn, ...], *, where: str) -> tuple[Turn, ...]:
    """The turns behind the system prompt that stands in a column of its own."""
    said = row.get("system")
    if not isinstance(said, str) or not said.strip() or turns[0]["role"] == "system":
        return turns
    return (Turn(role="system", content=whole(said, where=where)), *turns)


def _tools(row: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], ...]:
    """The tools that a conversation may call, as a list or as JSON text of one."""
    said = row.get("tools")
    if isinstance(said, str) and said.strip():
        said = _parsed(said)
        if said is None:
            raise SourceError(f"{where} has tools that are not JSON", hint="repair or remove them")
    if not said:
        return ()
    if not _is_list(said) or not all(isinstance(tool, Mapping) for tool in said):
        raise SourceError(
            f"{where} has tools {str(said)[:60]!r}, expected a list of objects", hint="repair or remove them"
        )
    whole(json.dumps(list(said), ensure_ascii=False, default=str), where=where)
    return tuple(dict(tool) for tool in said)


def _turns(entries: Sequence[Any], *, speaker: str, said: str, where: str) -> tuple[Turn, ...]:
    turns = tuple(
        _turn(entry, speaker=speaker, said=said, where=f"{where}[{number}]") for number, entry in enumerate(entries)
    )
    if not any(turn["role"] == "assistant" and (turn["content"].strip() or turn.get(CALLS)) for turn in turns):
        raise SourceError(
            f"{where} is a conversation without a reply, so nothing can be learnt from it",
            hint="remove that conversation",
        )
    return turns


def _turn(entry: Any, *, speaker: str, said: str, where: str) -> Turn:
    if not isinstance(entry, Mapping):
        raise SourceError(
            f"{where} is {str(entry)[:60]!r}, expected an object with `{speaker}` and `{said}`",
            hint="repair or remove that conversation",
        )
    who = entry.get(speaker, entry.get("role"))
    role = ROLES.get(who.strip().lower()) if isinstance(who, str) else None
    if role is None:
        raise SourceError(
            f"{where} has the speaker {who!r:.60}, expected `{speaker}` to be one of {', '.join(ROLES)}",
            hint="repair or remove that conversation",
        )
    calls = _calls(entry.get(CALLS), where=where)
    text = _content(entry.get(said, entry.get("content")), where=where)
    if text is None and not calls:
        raise SourceError(
            f"{where} has no text in `{said}`, found the keys {', '.join(map(str, entry))[:100]}",
            hint="repair or remove that conversation",
        )
    turn = Turn(role=role, content=whole(text or "", where=where))
    if calls:
        turn["tool_calls"] = calls
    for key in PASSED:
        if isinstance(entry.get(key), str):
            turn[key] = whole(entry[key], where=where)  # type: ignore[literal-required]
    return turn


def _content(value: Any, *, where: str) -> str | None:
    """The text of a turn: text, or parts of which all are text. None for nothing."""
    if value is None or isinstance(value, str):
        return value
    if not _is_list(value):
        raise SourceError(
            f"{where} has content of the type {type(value).__name__}, expected text or a list of parts",
            hint="repair or remove that conversation",
        )
    return "".join(_parts(value, where=where))


def _parts(parts: Sequence[Any], *, where: str) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise SourceError(
                f"{where} has a part of the type {kind!r:.40}, expected parts of the type 'text'",
                hint="remove conversations with images, sound or files",
            )
        yield text


def _calls(value: Any, *, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn; arguments in JSON text become an object, which templates expect."""
    if not value:
        return []
    if not _is_list(value) or not all(isinstance(call, Mapping) for call in value):
        raise SourceError(
            f"{where} has {CALLS} {str(value)[:60]!r}, expected a list of objects",
            hint="repair or remove that conversation",
        )
    found = []
    for call in value:
        function = call.get("function", call)
        plain = dict(function) if isinstance(function, Mapping) else {}
        if isinstance(plain.get("arguments"), str):
            parsed = _parsed(plain["arguments"])
            plain["arguments"] = plain["arguments"] if parsed is None else parsed
        found.append({**{key: each for key, each in call.items() if key != "function"}, "function": plain})
    whole(json.dumps(found, ensure_ascii=False, default=str), where=where)
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
