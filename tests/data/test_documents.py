"""Documents out of files and datasets, and every way in which those can be wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frankenmoe.checkpoint.hub import stream_rows
from frankenmoe.data.documents import PIECE, check_data, read_documents
from frankenmoe.data.rows import Document
from frankenmoe.errors import SourceError

CHAT = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]}
TURNS = ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."})


def write(folder: Path, name: str, *rows: object) -> str:
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
    return name


def read(folder: Path, *names: str) -> list[Document]:
    return list(read_documents(names, folder=folder))


def test_a_text_file_is_one_text_that_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffVoilà\r\nfin".encode())
    assert read(tmp_path, "a.txt") == [Document(text="Voilà\nfin", closed=False)]


def test_a_long_text_comes_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    lines = [f"line {number} " + "x" * 90 + "\n" for number in range(PIECE // 40)]
    (tmp_path / "a.txt").write_text("".join(lines))
    found = read(tmp_path, "a.txt")
    assert len(found) == 3
    assert all(document.text.endswith("\n") for document in found)
    assert "".join(document.text for document in found) == "".join(lines)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.JSONL", "rows.ndjson"])
def test_rows_with_text_and_conversations(tmp_path: Path, name: str) -> None:
    messages = {"messages": [dict(turn) for turn in TURNS]}
    write(tmp_path, name, {"text": "one\u2028two"}, CHAT, messages)
    assert read(tmp_path, name) == [Document("one\u2028two"), Document(turns=TURNS), Document(turns=TURNS)]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("jsonl")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in ["x", *texts]))
    assert [document.text for document in read(folder, "a.jsonl")] == ["x", *texts]


def test_a_real_datasets_library_streams_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path, "train.jsonl", {"text": "first"}, {"text": "second"})
    rows = stream_rows(str(tmp_path), revision=None, config=None, split="train")
    assert [row["text"] for row in rows] == ["first", "second"]
    with pytest.raises(SourceError, match="split 'tset' cannot be read"):
        list(stream_rows(str(tmp_path), revision=None, config=None, split="tset"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\n", "a.txt holds no text"),
        ("a.txt", b"caf\xe9", r"a.txt:1 is not UTF-8: byte 0xe9"),
        ("a.txt", "\ufeffé\n".encode() * 9000 + b"\n\xff", r"a.txt:9002 is not UTF-8: byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"a.jsonl:2 is not JSON"),
        ("a.json", b"[" * 100_000, r"a.json is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a\\ud800 b"}\n', r"a.jsonl:2 holds half a character, \\ud800"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "\\udc00"}]}',
            r"a.jsonl:1, messages\[0\] holds half a character, \\udc00",
        ),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl:3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a.jsonl:2 is a JSON list, expected an object"),
        ("a.jsonl", b'{"content": "a"}\n', r"a.jsonl:1 has neither `text`.*found content"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 has neither `text`"),
        ("a.jsonl", b'{"text": ""}\n', r"a.jsonl holds no text"),
        ("a.json", b'{"text": "a"}', r"a.json holds a JSON dict, expected a list"),
        ("a.json", b"[1", r"a.json is not JSON"),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "human", "value": "a"}]}',
            "a.jsonl:1, conversations is a conversation without a re",
        ),
        ("a.jsonl", b'{"conversations": []}', "a.jsonl:1, conversations is a conversation without a reply"),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "martian", "value": "a"}]}',
            r"a.jsonl:1, conversations\[0\] has the speaker 'martian'",
        ),
        (
            "a.json",
            b'[{"conversations": ["hi"]}]',
            r"entry 1 of .*a.json, conversations\[0\] is 'hi', expected",
        ),
        ("a.jsonl", b'{"text": null}', r"a.jsonl:1 has nothing in text \(null\)"),
        ("a.jsonl", b'{"instruction": "a", "output": " "}', "a.jsonl:1 has an empty output"),
        ("a.jsonl", b'{"prompt": "a", "completion": ""}', "a.jsonl:1 has an empty completion"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
            r"a.jsonl:1, messages\[0\] has no text in `content`, found the keys role, content",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            r"a.jsonl:1, messages\[0\] has a part of the type 'image_url'",
        ),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 7}]}', r"messages\[0\] has content of the type int"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "\\ud83d"}]}]}',
            "half a character",
        ),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": "f"}]}', r"messages\[0\] has tool_calls 'f'"),
        ("a.jsonl", b'{"tools": "[", "messages": [{"role": "assistant", "content": "a"}]}', "tools that are not JSON"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet"),
        ("..\\a.txt", b"", "holds no text"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path, name)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["missing.txt", "data/missing.jsonl", "a b", "../x/y/z"])
def test_a_name_of_nothing(tmp_path: Path, name: str) -> None:
    for use in (lambda: read(tmp_path, name), lambda: check_data([name], folder=tmp_path)):
        with pytest.raises(SourceError, match="does not exist, looked for at /"):
            use()


def test_a_folder_is_not_data(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a file"):
        check_data(["."], folder=tmp_path)


@pytest.mark.parametrize("name", ["org/name", "org/name@main", "org/name:test", "org/name@v1:config:train"])
def test_hub_names_are_not_looked_at_before_they_are_read(tmp_path: Path, name: str) -> None:
    check_data([name], folder=tmp_path)


def test_a_path_with_backslashes_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    with pytest.raises(SourceError) as caught:
        check_data(["texts\\a.txt"], folder=tmp_path)
    assert "backslashes: texts/a.txt, which is there" in str(caught.value.hint)


def test_a_line_without_end_comes_in_bounded_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (5 * PIECE))
    found = read(tmp_path, "a.txt")
    assert max(len(document.text) for document in found) <= 2 * PIECE
    assert sum(len(document.text) for document in found) == 5 * PIECE


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SHAPES = [
    ({"conversations": [{"from": "HUMAN", "value": "Hello?"}, {"from": "Gpt ", "value": "Hello."}]}, TURNS),
    ({"messages": [{"role": "User", "content": "Hello?"}, {"role": "ASSISTANT", "content": "Hello."}]}, TURNS),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello."}], "tool_calls": None},
            ]
        },
        TURNS,
    ),
    ({"text": None, "messages": [dict(turn) for turn in TURNS], "meta": None}, TURNS),
    (
        {"messages": [TURNS[0], TURNS[1] | {"reasoning_content": "Greet."}]},
        (TURNS[0], TURNS[1] | {"reasoning_content": "Greet."}),
    ),
    (
        {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        (
            TURNS[0],
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        ),
    ),
    ({"instruction": "Hello?", "input": "", "output": "Hello."}, TURNS),
    ({"instruction": "Hello?", "input": None, "output": "Hello."}, TURNS),
    ({"question": "Hello?", "answer": "Hello."}, TURNS),
    ({"prompt": [dict(TURNS[0])], "completion": [dict(TURNS[1])]}, TURNS),
    (
        {"instruction": "Say", "input": "it", "output": "Hello."},
        ({"role": "user", "content": "Say\n\nit"}, TURNS[1]),
    ),
    (
        {
            "system": "Be brief",
            "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}],
        },
        ({"role": "system", "content": "Be brief"}, *TURNS),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "Hello?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
                {"role": "assistant", "content": "Hello."},
            ]
        },
        (
            TURNS[0],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
            TURNS[1],
        ),
    ),
]


@pytest.mark.parametrize(("row", "turns"), SHAPES)
def test_shapes_of_conversations(row: dict[str, object], turns: object, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", row)
    (found,) = read(tmp_path, "a.jsonl")
    assert found.turns == turns


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [dict(turn) for turn in TURNS]
    write(
        tmp_path, "a.jsonl", {"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}
    )
    assert [document.tools for document in read(tmp_path, "a.jsonl")] == [tuple(tools)] * 2


def test_a_completion_follows_its_prompt(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"})
    assert read(tmp_path, "a.jsonl") == [Document(text="2 + 2 = 4", given=7)]


def test_parquet_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [dict(turn) for turn in TURNS]}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path, "a.parquet") == [Document(turns=TURNS)] * 3
