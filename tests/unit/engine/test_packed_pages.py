"""A kdump of a kdump has its packed pages as they are; an independent reader decides."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import kdump, open_dump
from qemu_dump_ext.engine.convert import convert
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.plan.request import DumpOptions
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.sinks import open_sink
from tests.support.sample_kdump import BLOCK, SampleKdump, flatten, make_kdump

_TEXT = b"a page that packs well, %d" % 7
_RANDOM = random.Random(7).randbytes(BLOCK)  # noqa: S311 - the same each time
_PAGES = {pfn: (b"%d " % pfn + _TEXT * 200)[:BLOCK] for pfn in (*range(1, 40), *range(600, 1400))}
_PAGES |= {700: bytes(BLOCK), 701: _PAGES[5], 702: _PAGES[1200], 703: _RANDOM, 704: _RANDOM}


def _pack(page: bytes) -> bytes:
    return zlib.compress(page, 9)


def _of_x86(image: SampleKdump) -> bytes:
    image.data[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    return bytes(image.data)


def _packed_to_a_page() -> tuple[bytes, bytes]:
    """Return a page, and a zlib stream of it of the same size, with many empty blocks."""
    for page in _PAGES.values():
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(page) + packer.flush()
        empty_blocks, rest = divmod(BLOCK - 6 - len(packed), 5)
        if not rest:
            blocks = b"\0\0\0\xff\xff" * empty_blocks
            return page, b"\x78\x01" + blocks + packed + struct.pack(">I", zlib.adler32(page))
    raise AssertionError


def _convert(source: Path, target: Path, *parts: Path, level: int | None = None) -> Path:
    with (
        open_dump(source, *parts) as dump,
        open_sink(str(target), force=False, standard_output=None) as sink,
    ):
        request = DumpOptions(level=level).of_format("kdump-raw-zlib")
        convert(request, dump, sink, progress=ProgressMeter(None))
    with open_dump(target) as dump:
        assert not verify_dump(dump).problems
    return target


def _stored(path: Path) -> dict[int, tuple[int, int, bytes]]:
    """Return offset, flags and bytes of each page by number."""
    image = path.read_bytes()
    sub_blocks, bitmap_blocks = struct.unpack_from("<iI", image, 432)
    end = BLOCK * (1 + sub_blocks + bitmap_blocks)
    bits = int.from_bytes(image[end - BLOCK * bitmap_blocks // 2 : end], "little")
    found: dict[int, tuple[int, int, bytes]] = {}
    for pfn in (pfn for pfn in range(bits.bit_length()) if bits >> pfn & 1):
        offset, size, flags, _ = struct.unpack_from("<qIIQ", image, end + 24 * len(found))
        found[pfn] = offset, flags, image[offset : offset + size]
    return found


@pytest.mark.parametrize("form", ["raw", "flattened", "split"])
def test_packed_pages_are_copied(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kdump, "PAGES_AT_ONCE", 100)
    whole = _of_x86(make_kdump(_PAGES, compress=_pack))
    source, parts = tmp_path / "in", []
    source.write_bytes(flatten(whole) if form == "flattened" else whole)
    if form == "split":
        parts = [tmp_path / "1", tmp_path / "2"]
        for part, (first, end) in zip(parts, ((0, 650), (650, 1400)), strict=True):
            own = {pfn: page for pfn, page in _PAGES.items() if first <= pfn < end}
            image = make_kdump(own, compress=_pack, max_mapnr=1400)
            maps = slice(image.bitmaps, image.bitmaps + 2 * image.bitmap_size)
            image.data[maps] = whole[maps]
            struct.pack_into("<i", image.data, BLOCK + 12, 1)
            struct.pack_into("<QQ", image.data, BLOCK + 80, first, end)
            part.write_bytes(_of_x86(image))
        source = parts.pop()
    found = _stored(_convert(source, tmp_path / "out", *parts))
    assert found.keys() == _PAGES.keys()
    for pfn, (_, flags, data) in found.items():
        expected = _pack(_PAGES[pfn]) if pfn not in {700, 703, 704} else _PAGES[pfn]
        assert (flags, data) == (int(len(expected) < BLOCK), expected), pfn
    for equal in ((701, 5), (702, 1200), (703, 704)):
        assert len({found[pfn][0] for pfn in equal}) == 1
    if form == "raw":
        anew = _stored(_convert(source, tmp_path / "anew", level=1))
        assert anew[5][2] != _pack(_PAGES[5])
        assert zlib.decompress(anew[5][2]) == _PAGES[5]


def test_what_another_codec_has_packed_is_packed_anew(tmp_path: Path):
    """So is what is packed to the size of a page, of which no reader would know that it is."""
    zstandard = pytest.importorskip("zstandard")
    image = make_kdump({1: _PAGES[1], 2: _RANDOM, 3: _RANDOM[::-1]}, compress=_pack)
    data, at = image.data, image.descriptors
    packed = zstandard.ZstdCompressor().compress(_RANDOM[:2000].ljust(BLOCK, b"a"))
    struct.pack_into("<II", data, at + 24 + 8, len(packed), 0x20)
    place = struct.unpack_from("<q", data, at + 24)[0]
    data[place : place + len(packed)] = packed
    page, large = _packed_to_a_page()
    struct.pack_into("<I", data, at + 48 + 12, 1)
    place = struct.unpack_from("<q", data, at + 48)[0]
    data[place : place + BLOCK] = large
    (tmp_path / "in").write_bytes(_of_x86(image))
    found = _stored(_convert(tmp_path / "in", tmp_path / "out"))
    assert found[1][1:] == (1, _pack(_PAGES[1]))
    assert zlib.decompress(found[2][2]) == _RANDOM[:2000].ljust(BLOCK, b"a")
    assert found[3][1] == 1
    assert zlib.decompress(found[3][2]) == page


def test_pages_of_a_dump_that_names_no_codec_are_packed(tmp_path: Path):
    (tmp_path / "in").write_bytes(_of_x86(make_kdump(_PAGES, compress=bytes, status=0)))
    found = _stored(_convert(tmp_path / "in", tmp_path / "out"))
    assert found[1][1] == 1
    assert zlib.decompress(found[1][2]) == _PAGES[1]


def test_a_packed_page_that_does_not_unpack_is_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image = make_kdump(_PAGES, compress=_pack)
    offset = struct.unpack_from("<q", image.data, image.descriptors + 24 * 100)[0]
    image.data[offset + 30] ^= 0x10
    (tmp_path / "in").write_bytes(_of_x86(image))
    with pytest.raises(CorruptDumpError, match=f"{offset:#x}: zlib page does not unpack"):
        _convert(tmp_path / "in", tmp_path / "out")
    words = ["convert", "-z", "-R", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(words) == 5
    assert "does not unpack" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
