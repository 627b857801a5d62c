"""Reads the pieces of a SentencePiece tokenizer.model.

The file is a protocol buffer: fields, each a key (number and wire type) and a value (varint, 4 or 8 bytes, or a length
and bytes). Three fields matter: pieces (1), trainer_spec (2) and normalizer_spec (3). Reading them here saves two
dependencies, sentencepiece and protobuf.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import SourceError

BPE = 2
Piece = tuple[str, float, int]
"""Text, score, type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""


def read_model(file: Path) -> tuple[list[Piece], bool, bool]:
    """(pieces in order of id, whether it is BPE, whether a text gets a space in front).

    Raises SourceError for a file that is not a SentencePiece model.
    """
    try:
        pieces, is_bpe, prefix = [], False, True
        for number, value in _fields(small_bytes(file)):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                is_bpe = dict(_fields(value)).get(3, 1) == BPE
            elif number == 3 and isinstance(value, bytes):
                prefix = bool(dict(_fields(value)).get(3, 1))
        if not pieces:
            raise ValueError("it has no pieces")
    except (ValueError, IndexError, struct.error) as error:
        raise SourceError(f"{file} is not a SentencePiece model: {error}", hint="fetch the file again") from error
    return pieces, is_bpe, prefix


def _piece(raw: bytes) -> Piece:
    fields = dict(_fields(raw))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    assert isinstance(text, bytes)
    assert isinstance(score, bytes)
    assert isinstance(kind, int)
    return text.decode("utf-8"), struct.unpack("<f", score)[0], kind


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(raw, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field {number} has the unknown wire type {wire}")
        if at + length > len(raw):
            raise ValueError("it is cut off")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
