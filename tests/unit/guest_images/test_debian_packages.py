from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest_images import debian_packages
from qemu_dump_ext.guest_images.debian_packages import (
    Distribution,
    PackageArchive,
    PackageSource,
    parse_deb822_sources,
    parse_one_line_sources,
    parse_package,
    read_machine_sources,
    select_sources,
)
from tests.support.waiting import wait_until

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEB822 = f"""\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
# not this
Suites: bookworm bookworm-updates
Components: main
Signed-By: {_KEYRING}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
  contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc=

Types: deb
Enabled: no
URIs: http://off.example
Suites: bookworm
Components: main

Types: deb-src
URIs: http://src.example
Suites: bookworm
Components: main
"""
_ONE_LINE = f"""\
# deb http://off.example bookworm main
deb http://mirror.example/debian bookworm main contrib # why
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by={_KEYRING}] http://mirror.example/debian-security bookworm-security main
deb [ signed-by=/etc/apt/keyrings/tool.asc ] https://tool.example/linux/debian bookworm stable
"""


def test_deb822_sources():
    assert parse_deb822_sources(_DEB822) == [
        PackageSource(
            ("http://mirror.example/debian",), ("bookworm", "bookworm-updates"), ("main",), _KEYRING
        ),
        PackageSource(
            ("http://mirror.example/debian-security",),
            ("bookworm-security",),
            ("main", "contrib"),
            "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc=",
        ),
    ]


def test_a_stanza_survives_being_written():
    sources = parse_deb822_sources(_DEB822)
    assert parse_deb822_sources("\n".join(source.stanza() for source in sources)) == sources


def test_one_line_sources():
    assert parse_one_line_sources(_ONE_LINE) == [
        PackageSource(("http://mirror.example/debian",), ("bookworm",), ("main", "contrib"), ""),
        PackageSource(
            ("http://mirror.example/debian-security",), ("bookworm-security",), ("main",), _KEYRING
        ),
        PackageSource(
            ("https://tool.example/linux/debian",),
            ("bookworm",),
            ("stable",),
            "/etc/apt/keyrings/tool.asc",
        ),
    ]


def test_a_folder_of_both_styles(tmp_path: Path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one.example a main\n")
    (tmp_path / "sources.list.d/two.sources").write_text(_DEB822)
    (tmp_path / "sources.list.d/three.list").write_text("deb http://three.example a main\n")
    (tmp_path / "sources.list.d/four.list.disabled").write_text("deb http://four.example a main\n")
    uris = [source.uris[0] for source in read_machine_sources(tmp_path)]
    assert uris == [
        "http://one.example",
        "http://three.example",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]


@pytest.mark.parametrize("suite", [None, "bookworm"])
def test_own_suites_leave_out_other_vendors_and_name_a_keyring(suite: str | None):
    chosen = select_sources(parse_one_line_sources(_ONE_LINE), "bookworm", "debian", suite)
    assert [source.uris[0] for source in chosen] == [
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]
    assert [source.signed_by for source in chosen] == [_KEYRING, _KEYRING]


@pytest.mark.parametrize(
    ("suite", "suites"),
    [("sid", ("sid",)), ("trixie-backports", ("trixie", "trixie-backports"))],
)
def test_another_suite_is_taken_from_the_main_mirror(suite: str, suites: tuple[str, ...]):
    assert select_sources(parse_deb822_sources(_DEB822), "bookworm", "debian", suite) == [
        PackageSource(("http://mirror.example/debian",), suites, ("main",), _KEYRING)
    ]


def test_no_source_is_an_error():
    with pytest.raises(SourceError, match="no package source for debian trixie"):
        select_sources(parse_deb822_sources(_DEB822), "trixie", "debian", None)


def test_a_package_pins_what_a_meta_package_stands_for():
    package = parse_package(
        "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nSize: 1508\n"
        "Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), libc6:any (>= 2), a | b\n"
        "Description: none\n\nPackage: other\n"
    )
    assert package.size == 1508
    assert package.depends == (
        ("linux-image-6.1.0-56-cloud-amd64", "6.1.192-2"),
        ("libc6", None),
        ("a", None),
        ("b", None),
    )


_APT_GET = """\
#!/bin/sh
mkdir {folder}/busy 2>/dev/null || {{ echo "E: Could not get lock" >&2; exit 100; }}
read -r _ <{folder}/go
rmdir {folder}/busy
"""


def test_who_comes_second_waits_for_the_others_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tools = {"apt-get": _APT_GET.format(folder=tmp_path), "apt-config": "#!/bin/sh\n"}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "go")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own = PackageSource(("http://mirror.example",), ("bookworm",), ("main",), _KEYRING)
    monkeypatch.setattr(debian_packages, "read_machine_sources", lambda: [own])
    archive = PackageArchive(
        tmp_path,
        distribution=Distribution("debian", "bookworm"),
        architecture="amd64",
        suite=None,
    )
    with ThreadPoolExecutor(2) as pool:
        updates = [pool.submit(archive.update) for _ in range(2)]
        wait_until(lambda: _somebody_waits(tmp_path) or any(one.done() for one in updates))
        while not all(one.done() for one in updates):
            with suppress(OSError):  # nobody reads yet
                _release(tmp_path / "go")
        assert [one.result() for one in updates] == [None, None]


def _release(fifo: Path) -> None:
    descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(descriptor, b"now\n")
    os.close(descriptor)


def _somebody_waits(folder: Path) -> bool:
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    inodes = [f":{lock.stat().st_ino} " for lock in folder.glob("*/lock")]
    return any(inode in line for inode in inodes for line in waiting)
