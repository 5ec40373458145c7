"""Crashes as pages of HTML, and a feed: nothing is loaded from elsewhere, and no server is needed.

::

    report.html            the signatures, and of each its crashes
    report.atom            the latest crashes of new signatures and regressions
    report-crashes/        one page for each crash

Whatever guests wrote is hostile; see `html`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree.ElementTree import Element

from qemu_dump_ext.crash_collector.collect.signature import report_of
from qemu_dump_ext.crash_collector.outlets.crash_page import (
    crash_page,
    dump_cell,
    opening_command,
    size_text,
    state_element,
)
from qemu_dump_ext.crash_collector.outlets.crash_source import (
    CrashSource,
    SourcedCrash,
    StoreSource,
    latest_states,
)
from qemu_dump_ext.crash_collector.outlets.feed import FEED_ID, feed_text
from qemu_dump_ext.crash_collector.outlets.groups import (
    SignatureGroup,
    group_crashes,
    guest_text,
)
from qemu_dump_ext.crash_collector.outlets.html import (
    HEAD,
    Content,
    copied,
    document,
    element,
    joined,
    link,
    preformatted,
    quoted,
    sort_key,
    table,
    time_element,
)
from qemu_dump_ext.crash_collector.store.files import replace_file
from qemu_dump_ext.crash_collector.store.states import STATE_NAMES
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import DumpWriteError, RequestError

REPORT_FILE = "report.html"
_SPARK_DAYS = 30
_SIGNATURES_MAX = 1000
_CRASHES_MAX = 200
_GUESTS_MAX = 4
_FEED_START = 1024
_LOG_BYTES = 64 << 10
_LOG_LINES = 40
_LOGS = ("dmesg.txt", "console.txt")


def write_report(store: CrashStore, output: Path, *, now: datetime) -> None:
    """Write the report of one store; arguments and errors as of `write_report_of`."""
    write_report_of([StoreSource(store, output)], output, now=now)


def write_report_of(sources: Sequence[CrashSource], output: Path, *, now: datetime) -> None:
    """Write all files of a report, each complete or not at all, for their owner alone.

    Args:
        sources: Whose crashes.
        output: Where to; only another report is replaced, and of what is beside it only what
            belongs to one.
        now: The last of the days that are shown.

    Raises:
        RequestError: Something else is there, or it has the name of a feed.
        SourceError: A source cannot be looked at.
        DumpWriteError: It cannot be written.
    """
    crashes = [crash for source in sources for crash in source.crashes()]
    states = latest_states([source.states() for source in sources])
    groups = group_crashes(crashes, [source.counts() for source in sources], states)
    title = f"Crashes in {', '.join(source.name for source in sources)}"
    feed, pages = output.with_suffix(".atom"), _directory_of_pages(sources, output)
    try:
        _require_ours(output, feed)
        _write_pages(groups, pages, output)
        replace_file(feed, feed_text(groups, title, output.name, now).encode())
        page = render_report(groups, title=title, now=now, pages=pages.name, feed=feed.name)
        replace_file(output, page.encode())
    except OSError as error:
        raise DumpWriteError(f"cannot write {output}: {error.strerror}") from error


def _directory_of_pages(sources: Sequence[CrashSource], output: Path) -> Path:
    name = f"{output.stem}-crashes"
    # In a store, directories are guests and crashes, but for hidden ones.
    parent = _real(output.parent)
    in_store = any(parent.is_relative_to(_real(Path(source.name))) for source in sources)
    return output.with_name(f".{name}" if in_store else name)


def _real(path: Path) -> Path:
    # Path.resolve() raises where symbolic links lead in a circle.
    return Path(os.path.realpath(path))


def _require_ours(output: Path, feed: Path) -> None:
    if output == feed:
        raise RequestError(f"{output} is the name of a feed", hint="--output FILE.html")
    if output.exists() and _start_of(output, len(HEAD)) != HEAD.encode():
        raise RequestError(f"{output} is there, and is no report of ours")
    if feed.exists() and FEED_ID.encode() not in _start_of(feed, _FEED_START):
        raise RequestError(f"{feed} is there, and is no feed of ours")


def _start_of(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def page_name(crash: SourcedCrash) -> str:
    """Return the name of the page of a crash, which no other crash has."""
    host = hashlib.sha256(crash.host.encode()).hexdigest()[:8] + "_" if crash.host else ""
    return f"{host}{crash.record.id.replace('/', '_')}.html"


def _write_pages(groups: Sequence[SignatureGroup], pages: Path, output: Path) -> None:
    """Write the pages that are not there as they should be, and remove those of crashes gone."""
    pages.mkdir(mode=0o700, exist_ok=True)
    wanted = set()
    for group in groups:
        for crash in group.crashes:
            name = page_name(crash)
            wanted.add(name)
            # All that is on it but the logs, which do not change.
            mark = hashlib.sha256(repr((crash.record, group.state)).encode()).hexdigest()
            path = pages / name
            if not _is_marked(path, mark):
                page = crash_page(crash, group, mark, output.name)
                replace_file(path, page.encode(), durable=False)  # thousands; written again
    for path in pages.glob("*.html"):
        if path.name not in wanted and _is_page(path):
            path.unlink(missing_ok=True)


def _is_page(path: Path) -> bool:
    """Return whether it is a page of ours, and not what somebody else has put there."""
    with contextlib.suppress(OSError):
        return path.is_file() and _start_of(path, len(HEAD)) == HEAD.encode()
    return False


def _is_marked(path: Path, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return mark.encode() in _start_of(path, 8192)
    return False


def render_report(
    groups: Sequence[SignatureGroup],
    *,
    title: str,
    now: datetime,
    pages: str,
    feed: str | None = None,
) -> str:
    """Return the page of all signatures.

    Args:
        groups: Those to show.
        title: The title of the page.
        now: The last of the days that are shown.
        pages: Way from the page to those of the crashes.
        feed: Way from the page to its feed, or None.
    """
    shown = groups[:_SIGNATURES_MAX]
    body = element(
        "body",
        element("h1", title),
        element("p", _summary(groups, now), class_="faint"),
        _controls(),
        _overview(shown, now),
        _left_out(len(groups) - len(shown), "signatures"),
        *(_section(group, pages) for group in shown),
    )
    return document(title, body, feed=feed)


def _summary(groups: Sequence[SignatureGroup], now: datetime) -> str:
    crashes = [crash.record for group in groups for crash in group.crashes]
    size = sum(facts.bytes for crash in crashes for facts in crash.files.values())
    seen = sum(group.count.count for group in groups)
    dumps = sum(crash.dump.file is not None for crash in crashes)
    by_state = Counter(group.state.state for group in groups)
    states = ", ".join(f"{by_state[name]} {name}" for name in STATE_NAMES if by_state[name])
    return (
        f"{_plural(seen, 'crash', 'crashes')} of {_plural(len(groups), 'signature')} seen"
        f"{f' ({states})' if states else ''}, {len(crashes)} kept with {_plural(dumps, 'dump')},"
        f" {size_text(size)}; {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    )


def _controls() -> Element:
    options = [
        element("option", "all states", value=""),
        element("option", "not resolved", value="unresolved"),
        *(element("option", name, value=name) for name in STATE_NAMES),
    ]
    search = element(
        "input",
        type="search",
        id="search",
        placeholder="message, function, guest, kernel, label",
        aria_label="search",
    )
    return element(
        "div",
        search,
        element("select", *options, id="state", aria_label="state"),
        element("span", id="count", class_="faint"),
        class_="controls",
        hidden="hidden",
    )


def _overview(groups: Sequence[SignatureGroup], now: datetime) -> Element:
    heads = ("State", "Signature", "Count", "Dumps", "Last seen", "First seen", "30 days")
    rows = []
    for group in groups:
        count, dumps = group.count, sum(c.record.dump.file is not None for c in group.crashes)
        frames = group.crashes[0].record.signature.frames[:2] if group.crashes else ()
        rows.append(
            element(
                "tr",
                element("td", state_element(group.state.state), data_key=str(_rank(group))),
                element(
                    "td",
                    link(f"#{group.signature_id}", count.message),
                    element("div", element("code", " < ".join(frames)), class_="faint"),
                    class_="text",
                ),
                element("td", str(count.count), class_="number", data_key=str(count.count)),
                element("td", str(dumps), class_="number", data_key=str(dumps)),
                element("td", time_element(count.last_seen), data_key=sort_key(count.last_seen)),
                element("td", time_element(count.first_seen), data_key=sort_key(count.first_seen)),
                element("td", _sparkline(group, now), data_key=str(_recent(group, now))),
                element("td", *joined(group.kernels), class_="kernels"),
                element("td", _some(group.guests), class_="text guests"),
                data_state=group.state.state,
                data_section=group.signature_id,
                data_search=_searched(group),
            )
        )
    return table((*heads, "Kernels", "Guests"), rows, class_="overview")


def _some(guests: Sequence[str]) -> str:
    more = len(guests) - _GUESTS_MAX
    return ", ".join(guests[:_GUESTS_MAX]) + (f" and {more} more" if more > 0 else "")


def _rank(group: SignatureGroup) -> int:
    return len(STATE_NAMES) - STATE_NAMES.index(group.state.state)


def _searched(group: SignatureGroup) -> str:
    words: set[str] = {group.signature_id, group.count.message, group.state.note, *group.merged}
    for crash in group.crashes[:_CRASHES_MAX]:
        record = crash.record
        words |= {guest_text(crash), record.kernel or "", record.cause.kind, record.cause.detail}
        words |= {*record.signature.frames, *record.labels.values()}
    return " ".join(sorted(words)).lower()


def _section(group: SignatureGroup, pages: str) -> Element:
    latest = group.crashes[0] if group.crashes else None
    shown = group.crashes[:_CRASHES_MAX]
    state = group.state
    facts: list[Content] = (
        [element("p", f"note: {state.note}", class_="text")] if state.note else []
    )
    if state.fixed_in:
        facts.append(element("p", f"fixed in {state.fixed_in}", class_="text"))
    if group.merged:
        facts.append(element("p", f"with {', '.join(group.merged)}", class_="faint text"))
    return element(
        "details",
        element(
            "summary",
            state_element(state.state),
            " ",
            element("h2", group.count.message, class_="text"),
            element("span", f" {_plural(group.count.count, 'time')}", class_="faint"),
        ),
        element("p", element("code", group.signature_id), class_="faint"),
        *facts,
        *(_evidence(latest) if latest else ()),
        table(
            ("Time", "Guest", "Kernel", "Cause", "Dump", "Stopped", "Files", "Remarks"),
            [_crash_row(crash, pages) for crash in shown],
        ),
        _left_out(len(group.crashes) - len(shown), "older crashes"),
        class_="signature",
        id=group.signature_id,
    )


def _evidence(crash: SourcedCrash) -> Sequence[Content]:
    """Return what the kernel said in the latest crash, and what opens its dump."""
    frames = crash.record.signature.frames
    lines = kernel_lines(crash)
    said = report_of(lines)
    return [
        element("p", *joined(element("code", frame) for frame in frames)) if frames else None,
        preformatted("\n".join(said)) if said else None,
        _log_end(lines),
        copied(opening_command(crash)) if crash.record.dump.file else None,
    ]


def _log_end(lines: Sequence[str]) -> Content:
    if not lines:
        return None
    return element(
        "details",
        element("summary", "the end of the log"),
        preformatted("\n".join(lines[-_LOG_LINES:])),
    )


def kernel_lines(crash: SourcedCrash) -> Sequence[str]:
    """Return the end of the kernel's log, or else of the console, of a crash."""
    for name in _LOGS:
        if name in crash.record.files:
            return crash.source.read_end(crash, name, _LOG_BYTES).splitlines()
    return ()


def _crash_row(crash: SourcedCrash, pages: str) -> Element:
    record = crash.record
    labels = ", ".join(f"{name}={value}" for name, value in sorted(record.labels.items()))
    files: list[Content] = []
    if crash.where:
        files = [link(f"{crash.where}/", "directory")]
        files += [link(f"{crash.where}/{quoted(name)}", name) for name in sorted(record.files)]
    if record.uploaded is not None:
        files.append(f"uploaded to {record.uploaded.url}")
    remarks = [*(["held"] if record.held else []), *record.dump.left_out, *record.remarks]
    page = f"{quoted(pages)}/{quoted(page_name(crash))}"
    return element(
        "tr",
        element("td", element("a", time_element(record.time), href=page)),
        element("td", guest_text(crash), element("div", labels, class_="faint"), class_="text"),
        element("td", record.kernel or "", class_="text"),
        element("td", record.cause.kind, element("div", record.cause.detail, class_="faint text")),
        element("td", *dump_cell(record.dump)),
        element("td", f"{record.guest_stopped_seconds:.1f} s", class_="number"),
        element("td", *joined(files), class_="text files"),
        element("td", *joined(remarks), class_="text"),
    )


def _recent(group: SignatureGroup, now: datetime) -> int:
    return sum(_by_day(group, now))


def _by_day(group: SignatureGroup, now: datetime) -> list[int]:
    today = now.astimezone(UTC).date()
    counted = Counter(
        (today - crash.record.moment.astimezone(UTC).date()).days for crash in group.crashes
    )
    return [counted[age] for age in reversed(range(_SPARK_DAYS))]


def _sparkline(group: SignatureGroup, now: datetime) -> Element:
    counts = _by_day(group, now)
    most = max(*counts, 1)
    bars = [
        element(
            "rect",
            x=str(4 * day),
            y=str(20 - max(2, 20 * count // most)),
            width="3",
            height=str(max(2, 20 * count // most)),
        )
        for day, count in enumerate(counts)
        if count
    ]
    first = now.astimezone(UTC).date() - timedelta(days=_SPARK_DAYS - 1)
    label = f"{_plural(sum(counts), 'crash', 'crashes')} that are kept, since {first}"
    width = str(4 * _SPARK_DAYS)
    size = {"width": width, "height": "21", "viewBox": f"0 0 {width} 21", "role": "img"}
    line = element("rect", x="0", y="20", width=size["width"], height="1", opacity=".3")
    return element("svg", element("title", label), line, *bars, **size)


def _left_out(count: int, what: str) -> Element | None:
    return element("p", f"{count} {what} are not shown.", class_="faint") if count > 0 else None


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or f'{one}s'}"
