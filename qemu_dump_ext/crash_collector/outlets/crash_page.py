"""The page of one crash: what the kernel said, what opens the dump, every fact, every file."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Comment, Element

from qemu_dump_ext.crash_collector.collect.signature import report_of
from qemu_dump_ext.crash_collector.outlets.crash_source import SourcedCrash
from qemu_dump_ext.crash_collector.outlets.groups import SignatureGroup, guest_text
from qemu_dump_ext.crash_collector.outlets.html import (
    Content,
    copied,
    document,
    element,
    joined,
    link,
    preformatted,
    quoted,
    time_element,
)
from qemu_dump_ext.crash_collector.record import DumpFacts

_LOG_BYTES = 64 << 10
_MIB = 1 << 20


def crash_page(crash: SourcedCrash, group: SignatureGroup, mark: str, report: str) -> str:
    """Return the page.

    Args:
        crash: The crash.
        group: That of its signature.
        mark: Stands in the page, to tell whether it is still true.
        report: Name of the report in the directory above.
    """
    record = crash.record
    title = f"{record.signature.message} ({guest_text(crash)})"
    log = _log(crash, "dmesg.txt")
    said = report_of((log or _log(crash, "console.txt")).splitlines())
    body = element(
        "body",
        element("p", link(f"../{quoted(report)}#{group.signature_id}", "← all crashes")),
        element("h1", record.signature.message),
        element("p", state_element(group.state.state), f" {group.state.note}", class_="text"),
        copied(opening_command(crash)) if record.dump.file else None,
        preformatted("\n".join(said)) if said else None,
        _facts(crash, group),
        _details("the end of the kernel's log", log),
        _details("the end of the console", _log(crash, "console.txt")),
        _details("registers", _log(crash, "registers.txt")),
    )
    body.insert(0, Comment(mark))
    return document(title, body)


def _log(crash: SourcedCrash, name: str) -> str:
    return crash.source.read_end(crash, name, _LOG_BYTES) if name in crash.record.files else ""


def _details(title: str, text: str) -> Content:
    if not text:
        return None
    return element("details", element("summary", title), preformatted(text))


def _facts(crash: SourcedCrash, group: SignatureGroup) -> Element:
    record, qemu = crash.record, crash.record.qemu
    where = f"../{crash.where}" if crash.where.startswith("./") else crash.where
    files: list[Content] = [
        link(f"{where}/{quoted(name)}", f"{name} ({size_text(facts.bytes)})")
        if where
        else f"{name} ({size_text(facts.bytes)})"
        for name, facts in sorted(record.files.items())
    ]
    facts: list[tuple[str, Sequence[Content]]] = [
        ("id", [element("code", record.id)]),
        ("guest", [guest_text(crash)]),
        *((name, [value]) for name, value in sorted(record.labels.items())),
        ("time", [time_element(record.time)]),
        ("kernel", [record.kernel or "unknown"]),
        ("cause", [f"{record.cause.kind}: {record.cause.detail}"]),
        ("signature", [f"{group.signature_id}, number {record.occurrence} of it"]),
        ("functions", joined(element("code", name) for name in record.signature.frames)),
        ("fixed in", [group.state.fixed_in] if group.state.fixed_in else []),
        ("dump", dump_cell(record.dump)),
        ("left out", joined(record.dump.left_out)),
        ("QEMU", [f"{qemu.version}, {qemu.target}, process {qemu.pid or 'unknown'}"]),
        ("stopped", [f"{record.guest_stopped_seconds:.3f} s; then: {record.after_action}"]),
        ("remarks", joined(record.remarks)),
        ("held", ["limits never remove it"] if record.held else []),
        ("uploaded", [record.uploaded.url] if record.uploaded else []),
        ("files", joined(files)),
    ]
    shown = [(name, contents) for name, contents in facts if contents]
    return element(
        "dl",
        *(
            part
            for name, contents in shown
            for part in (element("dt", name), element("dd", *contents))
        ),
    )


def opening_command(crash: SourcedCrash) -> str:
    """Return the command that opens the dump of a crash, where the store is."""
    return f"qemu-crash-collector open {crash.record.id}"


def state_element(state: str) -> Element:
    """Return the word of a state, which has a colour."""
    return element("span", state, class_=f"state {state}")


def dump_cell(dump: DumpFacts) -> Sequence[Content]:
    """Return what there is of a dump, or why there is none."""
    if dump.file is None:
        return ["none", element("div", dump.reason or "", class_="faint text")]
    state = ", ".join(dump.verified_by) or "not verified"
    return [
        f"{size_text(dump.bytes)} {dump.format}",
        None if dump.complete else element("div", "incomplete", class_="bad"),
        element("div", state, class_="faint"),
        element("div", dump.reason, class_="bad text") if dump.reason else None,
    ]


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / _MIB:.1f} MiB" if count >= _MIB else f"{count / 1024:.1f} KiB"
