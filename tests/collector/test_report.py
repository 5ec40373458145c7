"""The report, as a browser sees it."""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import stat
import struct
import subprocess
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qemu_dump_ext.cli.crash_collector_command import main
from qemu_dump_ext.crash_collector.outlets.report import render_report, write_report
from qemu_dump_ext.crash_collector.record import CrashCause, Signature, UploadFacts
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store

NOW = datetime(2026, 2, 10, 12, tzinfo=UTC)
HOSTILE = '</script></title><img src=x onerror="document.title=1"><script>document.title=2</script>'
_UNPRINTABLE = "\x1b[2J\u202eevil\x00\ud800"


def _hostile_store(path: Path) -> CrashStore:
    store = make_store(path)
    for number in range(3):
        record = make_record("web:1", time=f"2026-02-0{number + 1}T12:00:00.000001+00:00")
        commit(
            store,
            replace(
                record,
                cause=CrashCause("console", f"{HOSTILE} in the cause"),
                signature=Signature("f" * 16, HOSTILE, (HOSTILE, "panic")),
                labels={HOSTILE: '"><b>'},
                remarks=(f"{HOSTILE} in a remark",),
            ),
        )
    commit(store, make_record("db1", dump=False))
    return store


class _Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    store = _hostile_store(directory)
    write_report(store, directory / "page.html", now=NOW)
    return directory / "page.html"


def _chromium(directory: Path, *words: str) -> str:
    argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    profile = f"--user-data-dir={directory / 'profile'}"
    done = subprocess.run(
        [*argv, profile, *words], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed"
)


@needs_chromium
def test_what_guests_wrote_stays_text_in_a_browser(page, tmp_path):
    dom = _Elements(_chromium(tmp_path, "--dump-dom", page.as_uri()))
    allowed = "html head meta title style body h1 h2 p a code table thead tbody tr th td time div"
    assert set(dom.tags) == {*allowed.split(), "section", "svg", "rect", "br"}
    shown = "".join(dom.texts)
    for place in ("", " in the cause", " in a remark"):
        assert f"{HOSTILE}{place}" in shown
    assert dom.texts.count(f"Crashes in {page.parent / 'store'}") == 2  # title and heading


@needs_chromium
def test_page_looks_like_something(page, tmp_path):
    picture = tmp_path / "page.png"
    _chromium(tmp_path, "--window-size=1400,1000", f"--screenshot={picture}", page.as_uri())
    assert len(set(_rows(picture))) > 100  # text and lines, and no empty page


def _rows(picture: Path) -> list[bytes]:
    content = picture.read_bytes()
    width = struct.unpack_from(">I", content, 16)[0]
    channels = {2: 3, 6: 4}[content[25]]
    position, packed = 8, b""
    while position < len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IDAT":
            packed += content[position + 8 : position + 8 + size]
        position += 12 + size
    pixels = zlib.decompress(packed)
    stride = 1 + width * channels
    return [pixels[start : start + stride] for start in range(0, len(pixels), stride)]


def test_every_link_leads_to_what_it_says(page):
    dom = _Elements(page.read_text())
    ids = set(re.findall(r'<section id="(\w+)"', page.read_text()))
    followed = 0
    for link in dom.links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert link.startswith("./")
            assert (page.parent / link.replace("%3A", ":")).exists()
            followed += 1
    assert followed == 4 + 3 * 2 + 1  # directories; log and dump of three, log of the fourth


def test_count_dumps_and_guests_are_told(tmp_path):
    store = _hostile_store(tmp_path)
    with store.locked():
        store.remove(next(record for record in store.records() if record.guest == "web:1"))
    text = render_report(store.records(), store.signatures(), title="x", base=".", now=NOW)
    (row,) = re.findall(r"<tr><td[^>]*><a href=\"#f{16}\">.*?</tr>", text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[1:3] == ["3", "2"]  # seen, dumps kept
    assert "2026-02-01 12:00:00" in cells[3]
    assert "2026-02-03 12:00:00" in cells[4]
    assert "2 crashes that are kept, since 2026-01-12" in cells[5]
    assert cells[5].count("<rect") == 1 + 2  # the line, and a day for each
    assert cells[6] == "web:1"


def test_days_before_the_month_are_not_in_the_line():
    records = [
        replace(make_record(time=f"{day}T23:59:59.000000+00:00"), id=f"web1/{day}")
        for day in ("2026-01-11", "2026-01-12", "2026-02-10")
    ]
    text = render_report(records, {}, title="x", base=".", now=NOW)
    assert "2 crashes that are kept" in text
    assert re.findall(r'<rect x="(\d+)" y="0"', text) == ["0", "116"]


def test_what_cannot_be_printed_is_shown_by_its_number():
    record = replace(make_record(), cause=CrashCause("console", _UNPRINTABLE))
    text = render_report([record], {}, title="x", base=".", now=NOW)
    assert r"\u001b[2J\u202eevil\u0000\ud800" in text
    assert text.encode()


def test_why_there_is_no_dump_and_where_it_is_uploaded_is_told():
    record = make_record(dump=False)
    record = replace(
        record,
        dump=replace(record.dump, reason="the disk was full"),
        uploaded=UploadFacts("sftp://host/crash", record.time),
        held=True,
    )
    text = render_report([record], {}, title="x", base=".", now=NOW)
    assert "the disk was full" in text
    assert "uploaded to sftp://host/crash" in text
    assert ">held<" in text


def test_long_texts_and_lists_are_cut_and_that_is_said():
    record = replace(make_record(), cause=CrashCause("console", "x" * 9000))
    text = render_report([record] * 205, {}, title="x", base=".", now=NOW)
    assert "5 older crashes are not shown." in text
    assert f"{'x' * 500}…" in text
    assert "x" * 501 not in text


def test_command_writes_it_for_its_owner_and_replaces_only_reports(tmp_path, capsys):
    store = _hostile_store(tmp_path)
    for _ in range(2):
        assert main(["report", "--store", os.fspath(store.path)]) == 0
    written = store.path / "report.html"
    assert capsys.readouterr().out == f"{written}\n" * 2
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert 'href="./' in written.read_text()
    assert len(list(store.records())) == 4
    precious = tmp_path / "precious"
    precious.write_text("<!DOCTYPE html>")
    with pytest.raises(RequestError, match="is there, and is no report of ours"):
        write_report(store, precious, now=NOW)
    assert precious.read_text() == "<!DOCTYPE html>"
