"""Documents out of files and datasets, and every way in which those can be wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frankenmoe.checkpoint.hub import stream_rows
from frankenmoe.data.documents import PIECE, Document, check_data, read_documents
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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
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
            r"a.jsonl:1 holds half a character, \\udc00",
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
            "a.jsonl:1 is a conversation without a re",
        ),
        ("a.jsonl", b'{"conversations": []}', "a.jsonl:1 is a conversation without a reply"),
        ("a.jsonl", b'{"conversations": [{"from": "martian", "value": "a"}]}', "a.jsonl:1 has a turn .*martian"),
        ("a.json", b'[{"conversations": ["hi"]}]', "entry 1 of .*a.json has a turn"),
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
