"""The header: the same answer as the reference reader on valid files, one clear SourceError on anything else."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from frankenmoe.checkpoint.header import header_bytes, read_header
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.errors import SourceError

VALID = save(
    {
        "a": torch.zeros(2, 3),
        "b": torch.ones(5, dtype=torch.int8),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(1.0),
    },
    metadata={"format": "pt"},
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


def put(file: Path, header: object, *, data: int = 0) -> Path:
    """Write a file with any header (text, or an object to be dumped) and `data` bytes."""
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    return file


def tensor(*shape: Any, dtype: Any = "U8", offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_valid_file_reads_as_the_reference_reads_it(file: Path) -> None:
    file.write_bytes(VALID)
    refs = read_header(file)
    with safe_open(file, "pt") as reference:
        assert set(refs) == set(reference.keys())
        for name, ref in refs.items():
            expected = reference.get_tensor(name)
            assert ref.shape == tuple(expected.shape)
            assert getattr(torch, DTYPES[ref.dtype].name) == expected.dtype
            assert file.read_bytes()[ref.start : ref.end] == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_come_in_byte_order(file: Path) -> None:
    header = {"late": tensor(4, offsets=(4, 8)), "early": tensor(4)}
    assert list(read_header(put(file, header, data=8))) == ["early", "late"]


def test_file_without_tensors(file: Path) -> None:
    assert read_header(put(file, {})) == {}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ("[]", 0, "not a JSON object: it is a list"),
        ("{", 0, "not a JSON object"),
        ('{"a":' * 100_000, 0, "nested too deeply"),
        ('{"a": {"dtype": "U8", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 1]}}', 1, "not a JSON object"),
        ('{"a": 1, "a": 2}', 0, "the key 'a' occurs twice"),
        ('{"a": {"dtype": "U8", "shape": [4], "shape": [4], "data_offsets": [0, 4]}}', 4, "'shape' occurs twice"),
        ('{"\\ud800": 1}', 0, "surrogates not allowed"),
        ({"a": 7}, 0, "not described by exactly"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "not described by exactly"),
        ({"a": tensor(4) | {"more": 1}}, 4, "not described by exactly"),
        ({"a": tensor(4, dtype="F7")}, 4, "dtype 'F7', expected one of F64, F32"),
        ({"a": tensor(4, dtype=["U8"])}, 4, "dtype ['U8']"),
        ({"a": tensor(-4)}, 4, "shape [-4]"),
        ({"a": tensor(4.0)}, 4, "shape [4.0]"),
        ({"a": tensor(True, 4)}, 4, "shape [True, 4]"),
        ({"a": tensor(*[1] * 33, 4)}, 4, "up to 32 sizes"),
        ({"a": tensor(4) | {"shape": 4}}, 4, "shape 4"),
        ({"a": tensor(4, offsets=(0,))}, 4, "expected a start and an end"),
        ({"a": tensor(4, offsets=(-4, 0))}, 4, "data_offsets [-4, 0]"),
        ({"a": tensor(4, offsets=(0, 5))}, 5, "spans 5 bytes, but U8 [4] takes 4"),
        ({"a": tensor(4, offsets=(4, 0))}, 4, "spans -4 bytes"),
        ({"a": tensor(2**40, 2**40)}, 4, "takes 1208925819614629174706176"),
        ({"a": tensor(4), "b": tensor(4, offsets=(2, 6))}, 6, "'b' in {file} overlaps the tensor before it by 2 bytes"),
        ({"a": tensor(4), "b": tensor(4, offsets=(6, 10))}, 10, "'b' in {file} leaves a hole before it of 2 bytes"),
        ({"a": tensor(4, offsets=(1, 5))}, 5, "leaves a hole before it of 1 byte"),
        ({"a": tensor(4)}, 1, "is truncated: 3 of its"),
        ({"a": tensor(4)}, 9, "has 5 bytes after its last tensor"),
        ({"__metadata__": {"a": 1}}, 0, "not a map from text to text"),
        ({"__metadata__": ["a"]}, 0, "not a map from text to text"),
    ],
)
def test_malformed_header_is_refused(file: Path, header: object, data: int, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_header(put(file, header, data=data))
    assert message.format(file=file) in caught.value.message
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, expected at least 8"),
        (b"1234567", "has 7 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "expected at most 100,000,000"),
        ((3).to_bytes(8, "little") + b"{}", "a header of 3 bytes, but only 2 bytes follow"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not a JSON object: 'utf-8' codec"),
    ],
)
def test_broken_start_is_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_header(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError, match="is not a file"):
            read_header(path)


def parses(file: Path, content: bytes) -> bool:
    """Whether our reader takes `content`; whatever it takes, the reference must take too, with the same tensors."""
    file.write_bytes(content)
    try:
        refs = read_header(file)
    except SourceError:
        return False
    with safe_open(file, "np") as reference:
        assert {name: list(ref.shape) for name, ref in refs.items()} == {
            name: reference.get_slice(name).get_shape()
            for name in reference.keys()  # noqa: SIM118
        }
    return True


@settings(deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzz_changed_bytes(file: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for place, byte in edits:
        content[place] = byte
    parses(file, bytes(content))


@settings(deadline=None, max_examples=60)
@given(kept=st.integers(0, len(VALID) - 1))
def test_fuzz_truncated(file: Path, kept: int) -> None:
    assert not parses(file, VALID[:kept])


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200))
def test_fuzz_random_bytes(file: Path, content: bytes) -> None:
    parses(file, content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries({"dtype": st.sampled_from(["U8", "F32"]) | JSON, "shape": JSON, "data_offsets": JSON})


@settings(deadline=None, max_examples=100)
@given(header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=3))
def test_fuzz_json(file: Path, header: dict[str, Any]) -> None:
    put(file, header, data=4)
    parses(file, file.read_bytes())


def test_a_lying_length_allocates_nothing(file: Path) -> None:
    file.write_bytes((99_999_999).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(SourceError):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


ENTRIES = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=5,
    unique_by=lambda entry: entry[0],
)


@settings(deadline=None, max_examples=60)
@given(entries=ENTRIES, metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_our_headers_read_back(file: Path, entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict) -> None:
    header = header_bytes(entries, metadata=metadata)
    assert len(header) % 4096 == 0
    nbytes = sum(torch.Size(shape).numel() * DTYPES[dtype].itemsize for _, dtype, shape in entries)
    file.write_bytes(header + bytes(nbytes))
    refs = read_header(file)
    assert [(name, refs[name].dtype, refs[name].shape) for name, _, _ in entries] == entries
    assert len(refs) == len(entries)
    starts = [refs[name].start for name, _, _ in entries]
    assert starts == sorted(starts)
    assert not entries or starts[0] == len(header)
    try:
        with safe_open(file, "np") as reference:
            assert (reference.metadata() or {}) == metadata
    except SafetensorError as error:
        pytest.fail(str(error))


def test_a_name_occurs_once() -> None:
    with pytest.raises(ValueError, match="both be called 'a'"):
        header_bytes([("a", "U8", (1,)), ("a", "U8", (1,))], metadata={})
