from __future__ import annotations

import io
import json
import sys

import pytest

from qemu_dump_ext.cli import main
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, flatten, make_kdump, note, prstatus

QEMU_NOTE = note(b"QEMU", 0, bytes([1, 0, 0, 0, 184, 1, 0, 0]) + bytes(432))
ELF = make_elf(
    [Load(0x1000, b"a" * 5000), Load(0x100000, b"b" * 3000, memsz=4096)],
    notes=prstatus(7) + note(b"LINUX", 0x400, bytes(260)) + QEMU_NOTE,
)
SAMPLE = make_kdump(
    {0: b"text" * 1024, 1: bytes(BLOCK), 2: bytes(BLOCK)},
    vmcoreinfo=b"OSRELEASE=6.1.0-x\nPAGESIZE=4096\nOTHER=1\n",
)
KDUMP = bytes(SAMPLE.data)


@pytest.fixture
def run(tmp_path, capsys):
    def run_(command: str, data: bytes, *options: str) -> tuple[int, str, str]:
        path = tmp_path / "dump"
        path.write_bytes(data)
        status = main([command, *options, str(path)])
        return status, *capsys.readouterr()

    return run_


def test_inspect_elf_in_words(run):
    status, out, err = run("inspect", ELF)
    assert (status, err) == (0, "")
    for text in (
        "64 bit, little endian",
        "  e_machine    62",
        "notes: 3",
        "CORE        NT_PRSTATUS              336 bytes  pid 7",
        "LINUX       NT_ARM_VFP               260 bytes",
        "QEMU        type 0x0                 440 bytes  version 1  declared_bytes 440",
        "segments: 2",
        "4096 bytes, 3000 in the file",
        "memory: 9096 bytes, ranges: 2",
        "  0x0000000000001000 to 0x0000000000002387  5000 bytes",
    ):
        assert text in out, text
    assert "problem" not in out


def test_inspect_kdump_in_words(run):
    status, out, err = run("inspect", KDUMP)
    assert (status, err) == (0, "")
    for text in (
        ": kdump, ",
        "  sysname           Linux",
        "  max_mapnr         0x3",
        "  phys_base          0x1000000",
        "VMCOREINFO: 40 bytes",
        "  OSRELEASE  6.1.0-x",
        "  zero           2 (sharing one page)",
        "  zlib           1",
        "  second bitmap  3",
    ):
        assert text in out, text
    assert "OTHER" not in out


def test_inspect_kdump_as_json(run):
    status, out, _ = run("inspect", flatten(KDUMP), "--json")
    facts = json.loads(out)
    assert status == 0
    assert list(facts) == [
        *("file", "format", "size_bytes", "byte_order", "word_bits", "header", "sub_header"),
        *("pages", "notes", "vmcoreinfo", "memory", "problems"),
    ]
    assert facts["format"] == "kdump-flattened"
    assert facts["size_bytes"] == len(KDUMP)
    assert facts["vmcoreinfo"]["facts"]["OTHER"] == "1"
    pages = facts["pages"]
    stored = len(KDUMP) - SAMPLE.page_data - BLOCK
    assert pages == {
        "page_bytes": 4096,
        "first_bitmap": 3,
        "second_bitmap": 3,
        "zero": 2,
        "raw": 0,
        "packed": {"zlib": 1},
        "lost": 0,
        "bad": 0,
        "stored_bytes": stored,
        "ratio": round(3 * BLOCK / stored, 2),
    }
    assert facts["memory"] == {
        "size_bytes": 3 * BLOCK,
        "range_count": 1,
        "ranges": [{"gpa": 0, "size_bytes": 3 * BLOCK}],
    }
    assert facts["problems"] == []


def test_inspect_elf_as_json(run):
    facts = json.loads(run("inspect", ELF, "--json")[1])
    assert list(facts) == [
        *("file", "format", "size_bytes", "byte_order", "word_bits", "header", "segment_count"),
        *("segments", "notes", "vmcoreinfo", "memory", "problems"),
    ]
    assert facts["vmcoreinfo"] is None
    assert facts["segments"][1] == {
        "number": 2,
        "p_offset": len(ELF) - 11 - 3000,
        "p_vaddr": 0x100000,
        "p_paddr": 0x100000,
        "p_filesz": 3000,
        "p_memsz": 4096,
    }
    assert facts["notes"][0] == {
        "name": "CORE",
        "type": 1,
        "type_name": "NT_PRSTATUS",
        "size_bytes": 336,
        "offset": 64 + 2 * 64 + 3 * 56,
        "pid": 7,
    }
    assert (facts["notes"][2]["version"], facts["notes"][2]["declared_bytes"]) == (1, 440)


def test_inspect_shows_what_it_can_of_a_damaged_dump(run):
    status, out, _ = run("inspect", flatten(KDUMP)[:-30])
    assert status == 5
    assert "notes: 2" in out
    assert "problem: chunk at offset" in out
    damaged = bytearray(KDUMP)
    damaged[BLOCK + 104 : BLOCK + 108] = b"\xff" * 4
    status, out, _ = run("inspect", damaged)
    assert status == 5
    assert "problem: notes: note at offset 0x1068" in out
    assert "second bitmap  3" in out


def test_inspect_bounds_what_it_lists(run):
    data = make_elf([Load(number << 13, b"x" * 4096) for number in range(1100)])
    out = run("inspect", data)[1]
    assert "segments: 1100" in out
    assert out.count("and 1068 more (--json lists up to 1024)") == 2
    facts = json.loads(run("inspect", data, "--json")[1])
    assert (len(facts["segments"]), facts["segment_count"]) == (1024, 1100)
    assert (len(facts["memory"]["ranges"]), facts["memory"]["range_count"]) == (1024, 1100)
    assert facts["memory"]["size_bytes"] == 1100 * 4096


def test_verify_whole(run):
    assert run("verify", KDUMP) == (
        0,
        "ok: 3 pages (1 packed, 0 raw, 2 zero), 0.0 MiB of guest memory, kdump\n",
        "",
    )
    assert run("verify", ELF)[1].splitlines() == [
        "remark: 1 PT_LOAD have less data than memory: the rest reads as zero",
        "ok: 0.0 MiB of guest memory, elf",
    ]


def test_verify_damaged(run):
    status, out, err = run("verify", KDUMP[:-1])
    assert (status, err) == (5, "")
    first, last = out.splitlines()
    assert first.startswith("problem: page 0x0: descriptor with offset")
    assert last == (
        "damaged, 1 problem: 2 good pages (0 packed, 0 raw, 2 zero), 0.0 MiB of guest memory, kdump"
    )


def test_verify_bounds_its_problems(run):
    sample = make_kdump({number: b"%04d" % number * 1024 for number in range(50)})
    out = run("verify", sample.data[: sample.page_data + BLOCK])[1].splitlines()
    assert len(out) == 22
    assert out[20] == "problem: 30 more"


def test_verify_as_json(run):
    status, out, _ = run("verify", KDUMP[:-1], "--json")
    report = json.loads(out)
    assert status == 5
    assert list(report) == [
        *("file", "format", "ok", "memory_bytes", "pages", "problem_count", "problems", "remarks"),
    ]
    assert (report["ok"], report["problem_count"], len(report["problems"])) == (False, 1, 1)
    assert report["pages"] == {"zero": 2, "raw": 0, "packed": 0}
    report = json.loads(run("verify", ELF, "--json")[1])
    assert (report["ok"], report["pages"], report["memory_bytes"]) == (True, None, 8000)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_errors_are_one_line(run, command):
    status, out, err = run(command, b"no dump")
    assert (status, out) == (5, "")
    assert err.startswith(f"qemu-dump {command}: ")
    assert err.count("\n") == 1


def test_missing_codec_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzo", None)
    sample = make_kdump({0: b"text" * 1024}, compress=lambda _: b"packed", flag=2)
    status, out, err = run("verify", sample.data)
    assert (status, out) == (2, "")
    assert "pip install 'qemu_dump_ext[lzo]'" in err


def test_progress_on_a_terminal_only(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("verify", KDUMP)[0] == 0
    assert terminal.getvalue() == "\r100 % of 0 MiB\r\x1b[K"
