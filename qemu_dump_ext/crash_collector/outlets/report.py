"""The crashes of a store as one page of HTML: nothing is loaded from elsewhere, and nothing runs.

Whatever guests wrote is hostile: the page is built as a tree of elements, in which text stays
text, and what is not printable is shown by its number.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote
from xml.etree.ElementTree import Element, tostring

from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.files import replace_file
from qemu_dump_ext.crash_collector.store.store import CrashStore, SignatureCount
from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.printable import printable

REPORT_FILE = "report.html"
_HEAD = "<!DOCTYPE html>\n<!-- report of qemu-crash-collector -->\n"
_SPARK_DAYS = 30
_SIGNATURES_MAX = 1000
_CRASHES_MAX = 200
_TEXT_MAX = 500
# Only what is in the page itself: should text become markup after all, it still does nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid #8884; }
th { font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.text { overflow-wrap: anywhere; }
.files a { white-space: nowrap; }
.faint { opacity: .7; }
.bad { color: #c33; }
time, code { font-family: ui-monospace, monospace; font-size: .9em; }
time { white-space: nowrap; }
svg { display: block; fill: #c33; }
section { border-top: 2px solid #8888; margin-top: 2.5rem; }
:target { scroll-margin-top: 1rem; }
:target h2 { color: #c33; }
"""

Content: TypeAlias = str | Element | None


@dataclass(frozen=True)
class _Group:
    # All crashes of a signature that the store has, the newest first.
    signature_id: str
    count: SignatureCount
    crashes: Sequence[CrashRecord]


def write_report(store: CrashStore, output: Path, *, now: datetime) -> None:
    """Write the page, complete or not at all, for its owner alone.

    Args:
        store: Whose crashes.
        output: Where to; only another report is replaced.
        now: The last of the days that are shown.

    Raises:
        RequestError: Something else is there.
        DumpWriteError: It cannot be written.
    """
    page = render_report(
        list(store.records()),
        store.signatures(),
        title=f"Crashes in {store.path}",
        base=os.path.relpath(store.path, output.parent),
        now=now,
    )
    try:
        if output.exists():
            with output.open("rb") as file:
                if file.read(len(_HEAD)) != _HEAD.encode():
                    raise RequestError(f"{output} is there, and is no report of ours")
        replace_file(output, page.encode())
    except OSError as error:
        raise DumpWriteError(f"cannot write {output}: {error.strerror}") from error


def render_report(
    records: Iterable[CrashRecord],
    counts: Mapping[str, SignatureCount],
    *,
    title: str,
    base: str,
    now: datetime,
) -> str:
    """Return the page. Pure.

    Args:
        records: The crashes.
        counts: What was counted, by signature; also of crashes that are gone.
        title: The title of the page.
        base: Way from the page to the store.
        now: The last of the days that are shown.
    """
    groups = _group(records, counts)
    shown = groups[:_SIGNATURES_MAX]
    body = _element(
        "body",
        _element("h1", title),
        _element("p", _summary(groups, now), class_="faint"),
        _overview(shown, now),
        _left_out(len(groups) - len(shown), "signatures"),
        *(_section(group, base) for group in shown),
    )
    style = Element("style")
    style.text = _STYLE
    head = _element(
        "head",
        _element("meta", charset="utf-8"),
        _element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _element("meta", name="viewport", content="width=device-width"),
        _element("title", title),
        style,
    )
    return _HEAD + tostring(_element("html", head, body, lang="en"), "unicode", "html") + "\n"


def _group(
    records: Iterable[CrashRecord], counts: Mapping[str, SignatureCount]
) -> Sequence[_Group]:
    found: defaultdict[str, list[CrashRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.moment, reverse=True):
        found[record.signature.id].append(record)
    groups = []
    for signature_id in {**found, **counts}:
        crashes = found[signature_id]
        count = counts.get(signature_id) or SignatureCount(
            crashes[0].signature.message, len(crashes), crashes[-1].time, crashes[0].time
        )
        groups.append(_Group(signature_id, count, crashes))
    return sorted(groups, key=lambda group: group.count.last_seen, reverse=True)


def _summary(groups: Sequence[_Group], now: datetime) -> str:
    crashes = [crash for group in groups for crash in group.crashes]
    size = sum(facts.bytes for crash in crashes for facts in crash.files.values())
    seen = sum(group.count.count for group in groups)
    return (
        f"{_plural(seen, 'crash', 'crashes')} of {_plural(len(groups), 'signature')} seen,"
        f" {len(crashes)} kept with {_plural(_dumps(crashes), 'dump')}, {_size(size)};"
        f" {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    )


def _overview(groups: Sequence[_Group], now: datetime) -> Element:
    heads = ("Signature", "Count", "Dumps", "First seen", "Last seen", "30 days", "Guests", "")
    rows = []
    for group in groups:
        guests = sorted({crash.guest for crash in group.crashes})
        rows.append(
            _element(
                "tr",
                _element("td", _link(f"#{group.signature_id}", group.count.message), class_="text"),
                _element("td", str(group.count.count), class_="number"),
                _element("td", str(_dumps(group.crashes)), class_="number"),
                _element("td", _time(group.count.first_seen)),
                _element("td", _time(group.count.last_seen)),
                _element("td", _sparkline(group.crashes, now)),
                _element("td", ", ".join(guests), class_="text"),
                _element("td", _element("code", group.signature_id)),
            )
        )
    return _table(heads, rows)


def _section(group: _Group, base: str) -> Element:
    frames = group.crashes[0].signature.frames if group.crashes else ()
    shown = group.crashes[:_CRASHES_MAX]
    return _element(
        "section",
        _element("h2", group.count.message, class_="text"),
        _element("p", *_joined(_element("code", frame) for frame in frames)) if frames else None,
        _table(
            ("Time", "Guest", "Cause", "Dump", "Stopped", "Files", "Remarks"),
            [_crash_row(crash, base) for crash in shown],
        ),
        _left_out(len(group.crashes) - len(shown), "older crashes"),
        id=group.signature_id,
    )


def _crash_row(crash: CrashRecord, base: str) -> Element:
    labels = ", ".join(f"{name}={value}" for name, value in sorted(crash.labels.items()))
    directory = f"./{Path(base).as_posix()}/{crash.id}"
    files: list[Content] = [_link(f"{_quoted(directory)}/", "directory")]
    files += [_link(_quoted(f"{directory}/{name}"), name) for name in sorted(crash.files)]
    if crash.uploaded is not None:
        files.append(f"uploaded to {crash.uploaded.url}")
    remarks = [*(["held"] if crash.held else []), *crash.dump.left_out, *crash.remarks]
    return _element(
        "tr",
        _element("td", _time(crash.time)),
        _element("td", crash.guest, _element("div", labels, class_="faint"), class_="text"),
        _element("td", crash.cause.kind, _element("div", crash.cause.detail, class_="faint text")),
        _element("td", *_dump_cell(crash)),
        _element("td", f"{crash.guest_stopped_seconds:.1f} s", class_="number"),
        _element("td", *_joined(files), class_="text files"),
        _element("td", *_joined(remarks), class_="text"),
    )


def _dump_cell(crash: CrashRecord) -> Sequence[Content]:
    dump = crash.dump
    if dump.file is None:
        return ["none", _element("div", dump.reason or "", class_="faint text")]
    state = ", ".join(dump.verified_by) or "not verified"
    return [
        f"{_size(dump.bytes)} {dump.format}",
        None if dump.complete else _element("div", "incomplete", class_="bad"),
        _element("div", state, class_="faint"),
        _element("div", dump.reason, class_="bad text") if dump.reason else None,
    ]


def _sparkline(crashes: Sequence[CrashRecord], now: datetime) -> Element:
    today = now.astimezone(UTC).date()
    by_day = Counter((today - crash.moment.astimezone(UTC).date()).days for crash in crashes)
    counts = [by_day[age] for age in reversed(range(_SPARK_DAYS))]
    most = max(*counts, 1)
    bars = [
        _element(
            "rect",
            x=str(4 * day),
            y=str(20 - max(2, 20 * count // most)),
            width="3",
            height=str(max(2, 20 * count // most)),
        )
        for day, count in enumerate(counts)
        if count
    ]
    first = today - timedelta(days=_SPARK_DAYS - 1)
    label = f"{_plural(sum(counts), 'crash', 'crashes')} that are kept, since {first}"
    size = {"width": str(4 * _SPARK_DAYS), "height": "21", "role": "img"}
    line = _element("rect", x="0", y="20", width=size["width"], height="1", opacity=".3")
    return _element("svg", _element("title", label), line, *bars, **size)


def _table(heads: Sequence[str], rows: Sequence[Element]) -> Element:
    head = _element("thead", _element("tr", *(_element("th", text) for text in heads)))
    return _element("table", head, _element("tbody", *rows))


def _left_out(count: int, what: str) -> Element | None:
    return _element("p", f"{count} {what} are not shown.", class_="faint") if count > 0 else None


def _link(target: str, text: str) -> Element:
    return _element("a", text, href=target)


def _quoted(path: str) -> str:
    # Of a file system that need not know UTF-8.
    return quote(path.encode("utf-8", "surrogateescape"))


def _time(text: str) -> Element:
    return _element("time", text[:19].replace("T", " "), datetime=text)


def _joined(contents: Iterable[Content]) -> Sequence[Content]:
    return [part for content in contents for part in (content, _element("br"))][:-1]


def _dumps(crashes: Iterable[CrashRecord]) -> int:
    return sum(crash.dump.file is not None for crash in crashes)


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _element(tag: str, *contents: Content, **attributes: str) -> Element:
    # `class_` and `http_equiv` as Python has to write them.
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    element = Element(
        tag, {names[name]: printable(text, keep="") for name, text in attributes.items()}
    )
    for content in contents:
        if isinstance(content, Element):
            element.append(content)
        elif content is not None:
            text = printable(
                content if len(content) <= _TEXT_MAX else f"{content[:_TEXT_MAX]}…", keep=""
            )
            if len(element):
                element[-1].tail = (element[-1].tail or "") + text
            else:
                element.text = (element.text or "") + text
    return element
