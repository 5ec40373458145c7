"""What holds for each file of `page_codecs/`."""

from __future__ import annotations

import hashlib
import importlib
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_dump_ext.errors import CodecUnavailableError, CorruptDumpError
from qemu_dump_ext.page_codecs import PageCodec, all_page_codecs
from qemu_dump_ext.third_party import PACKAGES

CODECS = list(all_page_codecs().values())
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
PAGE_SIZES = (4096, 16384, 65536)
PAGES = {
    "zero": bytes(65536),
    "random": hashlib.shake_128(b"page").digest(65536),
    "text": b"".join(b"%d bottles of beer\n" % n for n in range(9999))[:65536],
}


def test_known_codecs():
    assert {codec.name: codec.page_flag for codec in CODECS} == {
        "zlib": 1,
        "lzo": 2,
        "snappy": 4,
        "zstd": 0x20,
    }


@EVERY_CODEC
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("content", PAGES)
@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_round_trip(codec: PageCodec, page_size, content, wrap):
    page = PAGES[content][:page_size]
    packed = codec.compressor()(wrap(page))
    assert type(packed) is bytes
    unpacked = codec.decompressor()(wrap(packed), page_size)
    assert type(unpacked) is bytes
    assert unpacked == page
    assert (len(packed) < page_size) == (content != "random")


@EVERY_CODEC
def test_one_maker_serves_many_pages(codec: PageCodec):
    compress, decompress = codec.compressor(), codec.decompressor()
    for number in range(50):
        page = hashlib.shake_128(b"%d" % number).digest(128) * 32
        assert decompress(compress(page), 4096) == page


@EVERY_CODEC
@pytest.mark.parametrize("content", PAGES)
def test_truncated(codec: PageCodec, content):
    packed = codec.compressor()(PAGES[content][:4096])
    decompress = codec.decompressor()
    for size in {0, 1, 2, 3, len(packed) // 2, *range(len(packed) - 5, len(packed))}:
        with pytest.raises(CorruptDumpError):
            decompress(packed[:size], 4096)


@EVERY_CODEC
@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 8192])
def test_wrong_size(codec: PageCodec, size):
    packed = codec.compressor()(PAGES["text"][:size])
    with pytest.raises(CorruptDumpError, match=codec.name):
        codec.decompressor()(packed, 4096)


@EVERY_CODEC
def test_bytes_behind_the_end(codec: PageCodec):
    packed = codec.compressor()(PAGES["text"][:4096])
    with pytest.raises(CorruptDumpError):
        codec.decompressor()(packed + b"x", 4096)


def peak_rss() -> int:
    """Return the most memory this process has had resident, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@EVERY_CODEC
def test_bomb_takes_no_memory(codec: PageCodec):
    bomb = codec.compressor()(bytes(256 << 20))
    decompress = codec.decompressor()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = peak_rss()
    with pytest.raises(CorruptDumpError):
        decompress(bomb, 4096)
    assert peak_rss() - before < len(bomb) + (32 << 20)


@EVERY_CODEC
@given(
    where=st.lists(st.integers(0, 1 << 20), max_size=4), what=st.integers(0, 255), raw=st.binary()
)
def test_rubbish_raises_nothing_else(codec: PageCodec, where, what, raw):
    packed = bytearray(codec.compressor()(PAGES["text"][:4096]))
    for position in where:
        packed[position % len(packed)] = what
    decompress = codec.decompressor()
    for data in (bytes(packed), raw):
        with suppress(CorruptDumpError):
            assert len(decompress(data, 4096)) == 4096


@pytest.mark.parametrize(
    "codec", [codec for codec in CODECS if codec.name != "zlib"], ids=lambda codec: codec.name
)
def test_missing_package(codec: PageCodec, monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    for make in (codec.compressor, codec.decompressor):
        with pytest.raises(
            CodecUnavailableError, match=r"-m pip install 'qemu_dump_ext\["
        ) as caught:
            make()
        assert caught.value.package in {package.name for package in PACKAGES.values()}
        assert codec.name in caught.value.message


def test_zlib_equals_best_speed():
    """QEMU's own pages are compared in the oracle tests; this pins level and container."""
    page = PAGES["text"][:4096]
    packed = all_page_codecs()["zlib"].compressor()(page)
    assert packed == zlib.compress(page, 1)
    assert packed[:2] == b"\x78\x01"


@pytest.mark.parametrize("hidden", [False, True], ids=["isal", "zlib"])
def test_checksum_of_zlib_is_looked_at_by_either_library(hidden, monkeypatch):
    if hidden:
        monkeypatch.setitem(sys.modules, "isal", None)
    page = PAGES["text"][:4096]
    decompress = all_page_codecs()["zlib"].decompressor()
    packed = bytearray(zlib.compress(page, 1))
    assert decompress(bytes(packed), 4096) == page
    packed[-1] ^= 1
    with pytest.raises(CorruptDumpError, match="zlib"):
        decompress(bytes(packed), 4096)
