"""An Atom feed of signatures: one entry each time that one is new, or comes back.

Source: RFC 4287.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from xml.etree.ElementTree import Element, SubElement, tostring

from qemu_dump_ext.crash_collector.outlets.crash_source import SourcedCrash
from qemu_dump_ext.crash_collector.outlets.groups import SignatureGroup, guest_text
from qemu_dump_ext.crash_collector.outlets.html import quoted
from qemu_dump_ext.printable import printable

FEED_ID = "urn:qemu-crash-collector:"
"""How the IDs of a feed and of its entries begin; the feed's own is the first in it."""
_ENTRIES_MAX = 100
_NAMESPACE = "http://www.w3.org/2005/Atom"


def feed_text(groups: Sequence[SignatureGroup], title: str, report: str, now: datetime) -> str:
    """Return the feed.

    Args:
        groups: The signatures.
        title: Of the report.
        report: Way from the feed to the report.
        now: When the report is written, for a feed that has nothing.
    """
    feed = Element("feed", xmlns=_NAMESPACE)
    entries = sorted(_entries(groups), key=lambda entry: entry[0], reverse=True)[:_ENTRIES_MAX]
    _add(feed, "id", f"{FEED_ID}{quoted(title)}")
    _add(feed, "title", title)
    _add(feed, "updated", entries[0][0] if entries else now.astimezone(UTC).isoformat())
    SubElement(_add(feed, "author", ""), "name").text = "qemu-crash-collector"
    SubElement(feed, "link", href=quoted(report))
    for time, what, group in entries:
        entry = SubElement(feed, "entry")
        crash = group.crashes[0] if group.crashes else None
        _add(entry, "id", f"{FEED_ID}{group.signature_id}:{what}:{time}")
        _add(entry, "title", f"{what}: {group.count.message}")
        _add(entry, "updated", time)
        SubElement(entry, "link", href=f"{quoted(report)}#{group.signature_id}")
        _add(entry, "summary", _summary(group, crash))
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(feed, "unicode") + "\n"


def _entries(groups: Sequence[SignatureGroup]) -> Iterator[tuple[str, str, SignatureGroup]]:
    for group in groups:
        yield group.count.first_seen, "new", group
        if group.state.state == "regression" and group.state.changed:
            yield group.state.changed, "regression", group


def _summary(group: SignatureGroup, crash: SourcedCrash | None) -> str:
    if crash is None:
        return f"seen {group.count.count} times"
    kernel = f", kernel {crash.record.kernel}" if crash.record.kernel else ""
    frames = " < ".join(crash.record.signature.frames[:6])
    return f"{guest_text(crash)}{kernel}; seen {group.count.count} times; {frames}"


def _add(parent: Element, tag: str, text: str) -> Element:
    child = SubElement(parent, tag)
    child.text = printable(text[:1000], keep="") or None
    return child
