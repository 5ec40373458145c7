"""Dump levels of a Linux guest: makedumpfile filters our whole dump, and we leave out the same."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from qemu_dump_ext.cli import main
from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.doors import run_cli, run_gdb
from tests.support.foreign_makedumpfile import makedumpfile_for
from tests.support.hmp_proxy import Proxy, QmpSocket
from tests.support.levels_of_dumps import left_out_of
from tests.support.pages_of_dumps import (
    bitmaps_by_makedumpfile,
    bitmaps_of,
    pages_of_elf,
    pages_of_zeros,
)

pytestmark = pytest.mark.guest

_PAGE = 4096
_ROM_PAGES = 64


def _level_of(dump: Path) -> int:
    (level,) = struct.unpack_from("<i", dump.read_bytes(), _PAGE + 8)
    return int(level)


@pytest.fixture(scope="module")
def whole(paused_linux: BootedGuest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything."""
    path = tmp_path_factory.mktemp("whole") / "elf"
    assert run_cli("--qmp", paused_linux.qmp_sockets[0], path).returncode == 0
    return path


@pytest.fixture(scope="module")
def makedumpfile(paused_linux: BootedGuest) -> list[str]:
    """One that tells the pages of this guest apart."""
    return makedumpfile_for("x86_64", paused_linux.files.release)


def _take(guest: BootedGuest, path: Path, *words: str) -> Path:
    done = run_cli("--qmp", guest.qmp_sockets[0], *words, path)
    assert done.returncode == 0, done.stderr
    return path


def test_exact_leaves_out_what_makedumpfile_leaves_out_at_each_level(
    paused_linux: BootedGuest, whole: Path, makedumpfile: list[str]
):
    everything = set(range(paused_linux.image.memory_mib * 256 + _ROM_PAGES))
    for level, left_out in left_out_of(whole, range(32)).items():
        covered, kept = bitmaps_by_makedumpfile(makedumpfile, whole, level)
        assert everything >= covered, level
        # It leaves out what lies behind the last section of memory, a ROM, at every level.
        assert everything - left_out == kept | (everything - covered), level


@pytest.mark.parametrize("level", [1, 31])
def test_exact_makes_the_kdump_that_makedumpfile_makes(
    paused_linux: BootedGuest, whole: Path, makedumpfile: list[str], tmp_path: Path, level: int
):
    ours = tmp_path / "ours"
    filtered = tmp_path / "filtered"
    words = ["-d", str(level), str(whole), str(filtered)]
    subprocess.run([*makedumpfile, *words], check=True, capture_output=True)
    _take(paused_linux, ours, "-l", "-R", "--exact", "--dump-level", f"{level}!")
    covered, kept = bitmaps_of(ours)
    covered_by_makedumpfile, kept_by_makedumpfile = bitmaps_of(filtered)
    behind = covered - covered_by_makedumpfile
    assert kept == kept_by_makedumpfile | behind
    assert len(covered) == paused_linux.image.memory_mib * 256 + _ROM_PAGES
    assert pages_of_zeros(ours) - behind == pages_of_zeros(filtered)
    assert _level_of(ours) == level


def test_by_default_more_is_kept(paused_linux: BootedGuest, tmp_path: Path):
    words = ("-l", "-R", "--dump-level", "31!")
    safe = bitmaps_of(_take(paused_linux, tmp_path / "safe", *words))
    exact = bitmaps_of(_take(paused_linux, tmp_path / "exact", *words, "--exact"))
    assert safe[0] == exact[0]
    assert safe[1] > exact[1]
    assert len(safe[1]) < len(safe[0]) / 2


def test_an_elf_core_has_segments_of_the_pages_that_stay(paused_linux: BootedGuest, tmp_path: Path):
    words = ("--dump-level", "31!")
    _, kept = bitmaps_of(_take(paused_linux, tmp_path / "kdump", *words, "-l", "-R"))
    core = _take(paused_linux, tmp_path / "elf", *words)
    assert pages_of_elf(core, _PAGE) == kept
    with core.open("rb") as file:
        loads = [s.header for s in ELFFile(file).iter_segments() if s.header.p_type == "PT_LOAD"]
    assert all(load.p_filesz == load.p_memsz for load in loads)


def test_in_gdb(paused_linux: BootedGuest, tmp_path: Path):
    path = tmp_path / "dump"
    words = f"qemu-dump-guest-memory -l -R --dump-level 31 --memory gdbstub {path}"
    done = run_gdb(paused_linux, [words])
    assert re.search(r"dump level 31: \d+\.\d of 256\.2 MiB", done.stdout), done.stdout
    by_cli = _take(paused_linux, tmp_path / "other", "-l", "-R", "--dump-level", "31")
    assert bitmaps_of(path) == bitmaps_of(by_cli)


def test_without_struct_pages_everything_is_kept_or_the_dump_refused(
    bare_machine: BootedGuest, tmp_path: Path
):
    socket = bare_machine.qmp_sockets[0]
    done = run_cli("--qmp", socket, "--dump-level", "31", tmp_path / "all")
    assert done.returncode == 0
    assert "dump level 31: there is no VMCOREINFO" in done.stderr
    assert "no page was left out" in done.stderr
    refused = run_cli("--qmp", socket, "--dump-level", "31!", tmp_path / "none")
    assert refused.returncode == 3
    assert "there is no VMCOREINFO" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


@pytest.mark.parametrize(
    ("words", "level"),
    [(("--dump-level", "1!"), 1), (("--dump-level", "31"), 1), (("--omit-zero",), 1)],
)
def test_the_sub_header_has_the_level_that_was_reached(
    bare_machine: BootedGuest, tmp_path: Path, words: tuple[str, ...], level: int
):
    assert _level_of(_take(bare_machine, tmp_path / "dump", "-z", "-R", *words)) == level


def _estimate(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main(["estimate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _without_sizes(told: Any) -> Any:
    # A packer does not always find the same.
    return {
        name: [{key: part[key] for key in part if not key.endswith("_bytes")} for part in parts]
        for name, parts in told.items()
        if name in {"classes", "dumps"}
    }


def test_what_dumps_will_take_is_told_before(
    paused_linux: BootedGuest, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    qmp = paused_linux.qmp_sockets[0]
    told = _estimate(capsys, "--qmp", qmp)
    pages = _without_sizes(told)
    assert _without_sizes(_estimate(capsys, "--guest", paused_linux.pid)) == pages
    by_gdb = _estimate(capsys, "--gdb", paused_linux.gdb_socket, "--qmp", qmp)
    assert _without_sizes(by_gdb) == pages
    with Proxy(tmp_path, "--qmp", qmp) as proxy:
        assert _without_sizes(_estimate(capsys, "--hmp", proxy.socket)) == pages
    assert _without_sizes(_estimate(capsys, whole))["dumps"] == pages["dumps"]
    found = {one["words"]: one for one in told["dumps"]}
    assert [one["file_bytes"] for one in found.values()] == sorted(
        (one["file_bytes"] for one in found.values()), reverse=True
    )
    for words in ("--dump-level 31", "--mini=smallest"):
        path = _take(paused_linux, tmp_path / words, "-z", "-R", *words.split())
        assert found[words]["pages"] == len(bitmaps_of(path)[1])
        assert 0.8 < found[words]["file_bytes"] / path.stat().st_size < 1.25


def test_at_the_qmp_door(paused_linux: BootedGuest, tmp_path: Path):
    def take(name: str, **extensions: Any) -> int:
        wanted: dict[str, Any] = {"paging": False, "protocol": f"file:{tmp_path / name}"}
        answer = client.execute("dump-guest-memory", **wanted, **extensions)[-1]
        assert "return" in answer, answer
        return (tmp_path / name).stat().st_size

    raw = {"format": "kdump-raw-zlib"}
    with (
        Proxy(tmp_path, "--qmp", paused_linux.qmp_sockets[0], qmp=True) as proxy,
        QmpSocket(proxy.qmp_socket) as client,
    ):
        client.execute("qmp_capabilities")
        take("exact", **raw, **{"x-dump-level": 31})
        assert take("fits", **raw, **{"x-max-bytes": 30 << 20}) <= 30 << 20
        mini = take("mini", **{"x-mini": "usual"})
        assert take("smallest", **{"x-mini": "smallest", "x-dump-level": "31!"}) < 0.8 * mini
    assert [_level_of(tmp_path / name) for name in ("exact", "fits")] == [31, 17]
    words = ("-z", "-R", "--dump-level", "31", "--exact")
    by_cli = _take(paused_linux, tmp_path / "other", *words)
    assert by_cli.read_bytes() == (tmp_path / "exact").read_bytes()


@pytest.mark.parametrize(("size", "level"), [("1GiB", 0), ("30MiB", 17)])
def test_the_lowest_level_that_fits_is_taken(
    paused_linux: BootedGuest, tmp_path: Path, size: str, level: int
):
    path = _take(paused_linux, tmp_path / "dump", "-z", "-R", "--max-bytes", size)
    assert _level_of(path) == (level or 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-z",), r"the dump would take about \d+\.\d MiB even at level 31: more than 1\.0 MiB"),
        (("--mini",), r"(?s)takes more than 1048576 bytes.*--mini=smallest takes less"),
        (("--dump-level", "31", "--no-vmcoreinfo"), r"even at level 31"),
    ],
)
def test_rather_no_dump_than_a_larger_one(
    paused_linux: BootedGuest, tmp_path: Path, words: tuple[str, ...], said: str
):
    socket = paused_linux.qmp_sockets[0]
    done = run_cli("--qmp", socket, "--max-bytes", "1MiB", *words, tmp_path / "dump")
    assert done.returncode == 4
    assert re.search(said, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())
