"""The report, as a browser sees it."""

from __future__ import annotations

import html.parser
import os
import re
import resource
import shutil
import stat
import struct
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from qemu_dump_ext.cli.crash_collector_command import main
from qemu_dump_ext.crash_collector.config.settings import Upload
from qemu_dump_ext.crash_collector.outlets.crash_source import SourcedCrash, StoreSource
from qemu_dump_ext.crash_collector.outlets.destination import Destination
from qemu_dump_ext.crash_collector.outlets.groups import group_crashes
from qemu_dump_ext.crash_collector.outlets.report import render_report, write_report
from qemu_dump_ext.crash_collector.record import CrashCause, CrashRecord, Signature, UploadFacts
from qemu_dump_ext.crash_collector.store.states import SignatureState, SignatureStates, StateName
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store, say

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
    allowed = "html head meta link title style body h1 h2 p a code table thead tbody tr th td time"
    allowed += " div span pre details summary input select option button script svg rect br"
    assert set(dom.tags) == set(allowed.split())
    assert dom.tags.count("script") == 1  # ours
    shown = "".join(dom.texts)
    for place in ("", " in the cause", " in a remark"):
        assert f"{HOSTILE}{place}" in shown
    assert dom.texts.count(f"Crashes in {page.parent / 'store'}") == 2  # title and heading
    assert "2 of 2" in dom.texts  # our script has run


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


def rendered(records: Sequence[CrashRecord], states: SignatureStates | None = None) -> str:
    """Of a store that is not there."""
    source = StoreSource(CrashStore(Path("/nonexistent")), Path("/page.html"))
    crashes = [SourcedCrash(record, source, "", f"./{record.id}", "") for record in records]
    groups = group_crashes(crashes, [], states or SignatureStates({}))
    return render_report(groups, title="x", now=NOW, pages="pages")


def test_every_link_leads_to_what_it_says(page):
    dom = _Elements(page.read_text())
    ids = set(re.findall(r'<details class="signature" id="(\w+)"', page.read_text()))
    followed = 0
    for link in dom.links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (page.parent / link.replace("%3A", ":")).exists(), link
            followed += 1
    # The feed; pages; directories; log and dump of three, log of the fourth.
    assert followed == 1 + 4 + 4 + 3 * 2 + 1


def test_every_crash_has_a_page_whose_links_lead_somewhere(page):
    pages = list((page.parent / "page-crashes").iterdir())
    assert len(pages) == 4
    for one in pages:
        dom = _Elements(one.read_text())
        assert HOSTILE in dom.texts or "sysrq triggered crash" in dom.texts
        for link in dom.links:
            assert (one.parent / link.partition("#")[0].replace("%3A", ":")).exists(), link


def test_pages_of_crashes_come_and_go_and_change_with_their_state(tmp_path):
    store = _hostile_store(tmp_path)
    output = tmp_path / "page.html"
    write_report(store, output, now=NOW)
    pages = tmp_path / "page-crashes"
    before = {path: path.stat().st_mtime_ns for path in pages.iterdir()}
    with store.locked():
        store.remove(next(record for record in store.records() if record.guest == "db1"))
    write_report(store, output, now=NOW)
    left = {path: path.stat().st_mtime_ns for path in pages.iterdir()}
    assert len(left) == 3
    assert left.items() <= before.items()  # not written again
    state = SignatureState("resolved", "by Ada", "6.12")
    store.change_states(lambda states: states.known.update({"f" * 16: state}))
    write_report(store, output, now=NOW)
    assert all("by Ada" in path.read_text() for path in pages.iterdir())


def test_count_dumps_and_guests_are_told(tmp_path):
    store = _hostile_store(tmp_path)
    with store.locked():
        store.remove(next(record for record in store.records() if record.guest == "web:1"))
    source = StoreSource(store, tmp_path / "page.html")
    groups = group_crashes(source.crashes(), [source.counts()], source.states())
    text = render_report(groups, title="x", now=NOW, pages="pages")
    (row,) = re.findall(r'<tr [^>]*data-section="f{16}".*?</tr>', text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[2:4] == ["3", "2"]  # seen, dumps kept
    assert "2026-02-03 12:00:00" in cells[4]
    assert "2026-02-01 12:00:00" in cells[5]
    assert "2 crashes that are kept, since 2026-01-12" in cells[6]
    assert cells[6].count("<rect") == 1 + 2  # the line, and a day for each
    assert cells[8] == "web:1"


def test_days_before_the_month_are_not_in_the_line():
    days = ("2026-01-11", "2026-01-12", "2026-02-10")
    text = rendered([make_record(time=f"{day}T23:59:59.000000+00:00") for day in days])
    assert "2 crashes that are kept" in text
    assert re.findall(r'<rect x="(\d+)" y="0"', text) == ["0", "116"]


def test_what_cannot_be_printed_is_shown_by_its_number():
    text = rendered([replace(make_record(), cause=CrashCause("console", _UNPRINTABLE))])
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
    text = rendered([record])
    assert "the disk was full" in text
    assert "uploaded to sftp://host/crash" in text
    assert ">held<" in text


def test_long_texts_and_lists_are_cut_and_that_is_said():
    record = replace(make_record(), cause=CrashCause("console", "x" * 9000))
    text = rendered([record] * 205)
    assert "5 older crashes are not shown." in text
    assert f"{'x' * 500}…" in text
    assert ">" + "x" * 501 not in text


def test_what_needs_somebody_is_first_and_merged_signatures_are_one():
    def record(signature: str, day: int) -> CrashRecord:
        time = f"2026-02-0{day}T12:00:00.000000+00:00"
        return replace(make_record(signature=signature * 16, time=time), kernel=f"6.{day}.0")

    states = SignatureStates(
        {
            "a" * 16: SignatureState("resolved"),
            "b" * 16: SignatureState("regression"),
            "c" * 16: SignatureState("merged", into="d" * 16),
        }
    )
    text = rendered([record(name, day) for day, name in enumerate("bcda", 1)], states)
    rows = re.findall(r'<tr [^>]*data-state="(\w+)" data-section="(\w)', text)
    assert rows == [("open", "d"), ("regression", "b"), ("resolved", "a")]
    (row,) = re.findall(r'<tr [^>]*data-section="d{16}".*?</tr>', text)
    assert "6.3.0<br>6.2.0" in row


def test_feed_has_what_is_new_and_what_came_back(page):
    feed = ET.fromstring(page.with_suffix(".atom").read_text())  # noqa: S314 - ours
    names = {"a": "http://www.w3.org/2005/Atom"}
    titles = [entry.findtext("a:title", "", names) for entry in feed.iterfind("a:entry", names)]
    assert titles == [f"new: {HOSTILE}", "new: sysrq triggered crash"]
    for link in feed.iterfind(".//a:link", names):
        assert (page.parent / link.attrib["href"].partition("#")[0]).exists()
    assert feed.findtext("a:updated", "", names).startswith("2026-02-01T12:00:00")


def test_fleet_is_one_page_of_many_stores_and_of_what_they_uploaded(tmp_path, capsys):
    for host in ("north", "south"):
        store = CrashStore(tmp_path / host)
        store.prepare()
        commit(store, make_record("web1", time=f"2026-02-01T12:00:0{len(host) % 4}.000000+00:00"))
    output = tmp_path / "fleet.html"
    words = ["--from", str(tmp_path / "north"), "--from", str(tmp_path / "south")]
    assert main(["report", *words, "--output", str(output)]) == 0
    text = output.read_text()
    assert "2 crashes of 1 signature seen" in text
    assert "north/web1, south/web1" in text
    assert len(list((tmp_path / "fleet-crashes").iterdir())) == 2
    for link in _Elements(text).links:
        assert link.startswith("#") or (tmp_path / link).exists(), link
    remote = tmp_path / "remote.html"
    assert main(["report", "--from", f"file://{tmp_path}", "--output", str(remote)]) == 0
    assert "north/web1, south/web1" in remote.read_text()
    assert ">log<" in remote.read_text()  # the end of the log, read from there
    capsys.readouterr()
    assert main(["report", "--from", str(tmp_path / "east"), "--output", str(remote)]) == 2
    assert "there is no store" in capsys.readouterr().err
    assert main(["report", "--from", str(tmp_path / "north")]) == 2
    assert "--output FILE" in capsys.readouterr().err


def test_fleet_has_the_states_of_all_hosts_of_each_what_was_said_last(tmp_path, caplog):
    said: dict[str, tuple[StateName, str]] = {
        "north": ("acknowledged", "2026-02-02T12:00:00.000000+00:00"),
        "south": ("resolved", "2026-02-03T12:00:00.000000+00:00"),
    }
    for host, (state, time) in said.items():
        store = make_store(tmp_path / host)
        record = commit(store, make_record())
        say(store, record.signature.id, state, f"by {host}", time)
        destination = Destination(Upload(f"file://{tmp_path}/remote/{host}"))
        destination.put(store, record)
        destination.put_states(store.states())
    for path in (tmp_path / "remote").glob("*/.states-*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "remote" / ".states-damaged.json").write_text("[]")
    output = tmp_path / "fleet.html"
    assert main(["report", "--from", f"file://{tmp_path}/remote", "--output", str(output)]) == 0
    text = output.read_text()
    assert "2 crashes of 1 signature seen (1 resolved)" in text
    assert "by south" in text
    assert "by north" not in text
    assert ".states-damaged.json is passed over: it is no object of JSON" in caplog.text


@needs_chromium
def test_five_thousand_crashes_are_there_in_two_seconds(tmp_path):
    """Measured by the browser itself, of which the machine may have little: CPU time counts."""
    records = [
        replace(
            make_record(
                f"web{number % 40}",
                signature=f"{number % 250:016x}",
                time=f"2026-01-{1 + number % 28:02}T12:00:00.{number:06}+00:00",
            ),
            kernel=f"6.{number % 9}.0",
        )
        for number in range(5000)
    ]
    page = tmp_path / "page.html"
    page.write_text(rendered(records))
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    _chromium(tmp_path, "--dump-dom", (tmp_path / "nothing.html").as_uri())
    empty = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    dom = _chromium(tmp_path, "--dump-dom", page.as_uri())
    full = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert "250 of 250" in dom
    print(f"{full - empty - (empty - started):.2f} s of CPU time more than an empty page")


def test_command_writes_it_for_its_owner_and_replaces_only_reports(tmp_path, capsys):
    store = _hostile_store(tmp_path)
    for _ in range(2):
        assert main(["report", "--store", os.fspath(store.path)]) == 0
    written = store.path / "report.html"
    assert capsys.readouterr().out == f"{written}\n" * 2
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert 'href="./' in written.read_text()
    assert len(list((store.path / ".report-crashes").iterdir())) == 4  # no guest of the store
    assert len(list(store.records())) == 4
    precious = tmp_path / "precious"
    precious.write_text("<!DOCTYPE html>")
    with pytest.raises(RequestError, match="is there, and is no report of ours"):
        write_report(store, precious, now=NOW)
    assert precious.read_text() == "<!DOCTYPE html>"


def test_what_others_have_beside_a_report_stays(tmp_path):
    store = _hostile_store(tmp_path)
    output, foreign = tmp_path / "site.html", tmp_path / "site-crashes" / "index.html"
    write_report(store, output, now=NOW)
    foreign.write_text("<!DOCTYPE html>")
    os.mkfifo(foreign.with_name("pipe.html"))
    with store.locked():
        store.remove(next(record for record in store.records() if record.guest == "db1"))
    write_report(store, output, now=NOW)
    assert foreign.read_text() == "<!DOCTYPE html>"
    assert len(list(foreign.parent.iterdir())) == 2 + 3  # that of the crash that is gone is gone
    feed, page = output.with_suffix(".atom"), output.read_text()
    feed.write_text("<feed/>")
    with pytest.raises(RequestError, match=r"site\.atom is there, and is no feed of ours"):
        write_report(store, output, now=NOW)
    assert (feed.read_text(), output.read_text()) == ("<feed/>", page)
    with pytest.raises(RequestError, match="is the name of a feed"):
        write_report(store, tmp_path / "other.atom", now=NOW)


@pytest.mark.parametrize("place", [".", "web:1", "link"])
def test_pages_in_a_store_are_no_guest_however_it_is_named(tmp_path, monkeypatch, place):
    store = _hostile_store(tmp_path)
    (store.path / "link").symlink_to(".")
    monkeypatch.chdir(store.path)
    output = Path(place, "report.html")
    assert main(["report", "--store", os.fspath(store.path), "--output", str(output)]) == 0
    assert (output.parent / ".report-crashes").is_dir()
    assert not (output.parent / "report-crashes").exists()
