from __future__ import annotations

import struct

import pytest

from qemu_dump_ext.dump_readers._flattened_image import FlattenedImage
from qemu_dump_ext.dump_readers._image import PlainImage
from qemu_dump_ext.errors import CorruptDumpError
from tests.support.sample_kdump import FLAT_END, FLAT_HEAD, flatten


def chunk(offset: int, data: bytes) -> bytes:
    return struct.pack(">qq", offset, len(data)) + data


@pytest.fixture
def open_stream(tmp_path):
    def open_(stream: bytes) -> FlattenedImage:
        path = tmp_path / "stream"
        path.write_bytes(stream)
        return FlattenedImage(PlainImage(path))

    return open_


def test_chunks_in_any_order(open_stream):
    data = bytes(range(256)) * 50
    image = open_stream(flatten(data))
    assert image.problems == ()
    assert image.size == len(data)
    assert image.read(0, len(data)) == data
    assert image.read(5999, 3) == data[5999:6002]


def test_later_chunk_wins_and_gaps_are_zero(open_stream):
    image = open_stream(
        FLAT_HEAD + chunk(0, b"aaaa") + chunk(10, b"cc") + chunk(1, b"bb") + FLAT_END
    )
    assert image.read(0, 12) == b"abba" + bytes(6) + b"cc"
    with pytest.raises(CorruptDumpError, match="beyond the dump's end at 0xc"):
        image.read(11, 2)


WILD = {
    "negative offset": (struct.pack(">qq", -5, 4) + b"data", "offset -5, size 4"),
    "size -2": (struct.pack(">qq", 8, -2), "offset 8, size -2"),
    "empty": (struct.pack(">qq", 8, 0), "offset 8, size 0"),
    "half an end marker": (struct.pack(">qq", -1, 7) + b"1234567", "offset -1, size 7"),
    "endless": (struct.pack(">qq", 8, 1 << 62), "0x4000000000000000 bytes reaches beyond"),
    "beyond all": (struct.pack(">qq", (1 << 63) - 1, 4) + b"data", "bad chunk header"),
    "cut in the data": (chunk(8, b"abcdefgh")[:-1], "reaches beyond the end"),
    "cut in the header": (chunk(8, b"abcdefgh")[:9], "no end marker"),
    "no end": (b"", "no end marker"),
}


@pytest.mark.parametrize("kind", WILD)
def test_damage_is_told_and_does_not_read_as_zero(open_stream, kind):
    wild, message = WILD[kind]
    stream = FLAT_HEAD + chunk(0, b"abcd") + chunk(6, b"xy") + wild
    image = open_stream(stream + (b"" if "cut" in kind or "no end" in kind else FLAT_END))
    assert len(image.problems) == 1
    assert message in image.problems[0]
    assert image.read(0, 4) == b"abcd"
    with pytest.raises(CorruptDumpError, match="missing"):
        image.read(3, 5)


def test_bytes_behind_the_end_are_told(open_stream):
    image = open_stream(FLAT_HEAD + chunk(3, b"abcd") + FLAT_END + b"more")
    assert image.read(0, 4) == b"\0\0\0a"
    assert image.problems == ("4 bytes behind the end marker at offset 0x1014",)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (FLAT_HEAD + FLAT_END, "without a chunk"),
        (FLAT_HEAD, "no end marker"),
        (FLAT_HEAD[:20], "beyond the dump's end"),
        (struct.pack(">16sqq", b"makedumpfile", 2, 1).ljust(5000), "type 2"),
    ],
)
def test_nothing_to_read(open_stream, stream, message):
    with pytest.raises(CorruptDumpError, match=message):
        open_stream(stream)
