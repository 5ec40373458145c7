"""The signature of a crash, by which the same one is recognised: what does not change.

Source: how Linux words its reports: kernel/panic.c, lib/dump_stack.c, arch/*/kernel/dumpstack.c,
arch/arm64/kernel/traps.c, arch/powerpc/kernel/process.c, arch/s390/kernel/dumpstack.c.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_dump_ext.crash_collector.record import CrashCause, Signature

_FRAMES_COUNTED = 6
_FRAMES_KEPT = 32
_REPORT_LINES_MAX = 400
_REPORT_HEAD_LINES = 12
_REPORT_HEAD_SECONDS = 1.0
_MESSAGE_MAX = 300
_SHOWN_MAX = 80
_LOGS = ("dmesg.txt", "console.txt")
_LOG_BYTES_MAX = 1 << 20

_PANIC = re.compile(r"(?<!---\[ end )Kernel panic - not syncing: (?P<why>.*)")
# Says only that something went wrong before, which has a report of its own.
_SECONDARY = re.compile(
    r"(?:Oops: )?Fatal exception|softlockup: hung|hung_task: blocked|\w+_on_\w+ set|RCU Stall"
    r"|Hard LOCKUP"
)
_REPORT = re.compile(
    r"BUG: |kernel BUG at |Oops|general protection fault|double fault|Unable to handle kernel"
    r"|Internal error: |soft lockup|hard LOCKUP|self-detected stall|detected stalls"
    r"|INFO: task .* blocked|WARNING: |Kernel panic - not syncing|Unable to handle kernel"
    r"|Kernel stack overflow|divide error|invalid opcode"
)
_TRACE = re.compile(r"^\s*Call [Tt]race:|^\s*Backtrace:")
_FRAME = re.compile(
    r"^\s*(?:\[[<0-9a-f>]+\] )?(?P<unsure>\? )?(?:\[<?[0-9a-f]+>?\] )?(?:\((?:\[<[0-9a-f]+>\] )?)?"
    r"(?P<name>[A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x[0-9a-f]+"
)
# ppc64: [stack] [address] name+0x.../0x...; s390: [<address>] name+0x...
_POWERPC_FRAME = re.compile(
    r"^\s*\[[0-9a-f]{8,16}\] \[[0-9a-f]{8,16}\] (?P<name>[A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x"
)
_COUNTER = re.compile(
    r"^\s*(?:E?RIP: (?:[0-9a-f]{4}:)?|pc : |PC is at |NIP \[[0-9a-f]+\] |Krnl PSW : .*\()"
    r"(?P<name>[A-Za-z_][\w.]*)\+0x"
)
_BETWEEN = re.compile(r"^\s*(?:</?[A-Z_#\d]+>|\(\[<.*|Last Breaking.*)\s*$")
# How a crash is reported, and not where it happened.
_MACHINERY = re.compile(
    r"(?:__|_)?(?:dump_stack(?:_lvl)?|show_stack(?:_regs)?|dump_backtrace|vpanic|panic|die|oops_end"
    r"|dump_header|page_fault_oops|crash_kexec|nmi_panic|__die|make_task_dead)(?:\.\w+)*"
)
_COMPILER_SUFFIX = re.compile(r"\.(?:isra|constprop|part|cold|llvm|lto_priv)(?:\.\d+)?\b.*")

_STAMP = re.compile(r"^(?:<\d+>)?\[\s*(\d+\.\d+)\](?:\[\s*[TC]\d+\])? ?")
_CHANGES = (
    (re.compile(r"\b(comm|COMM|Comm): ?\S+"), r"\1: ?"),
    (re.compile(r"\b(PID|pid|Pid|CPU|cpu|UID)([:#]? ?)\d+"), r"\1\2N"),
    (re.compile(r"\[[^\[\]]*:\d+\]"), "[?]"),  # [kworker/0:1:123]
    (re.compile(r"\btask \S+:\d+"), "task ?"),
    (re.compile(r"\b0x[0-9a-fA-F]+"), "0x?"),
    (re.compile(r"(?<=\+0x\?)/0x\?"), "/0x?"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b"), "?"),
    (re.compile(r"(?<![\w.])(?<!\.[chS]:)(?<!\.rs:)-?\d+(?:\.\d+)?(?=s?\b)"), "N"),
)
# What the log tells about: of other causes, an old report in it would be taken for the crash.
_LOGGED = frozenset(
    ("guest-panicked", "crashloaded", "watchdog", "console", "internal-error", "qemu-died")
)


def normalise(message: str) -> str:
    """Take out of a message what differs from one crash to the next.

    Time stamps, addresses and other hexadecimal numbers, numbers of processes and CPUs, names of
    processes, and counts; not the line of a source file.
    """
    text = _STAMP.sub("", message.strip())
    for pattern, replacement in _CHANGES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())[:_MESSAGE_MAX]


def make_signature(
    cause: CrashCause,
    log: Sequence[str],
    *,
    functions: Sequence[str] = (),
    trace: Sequence[str] = (),
    message: str | None = None,
) -> Signature:
    """Return the signature of a crash.

    Args:
        cause: Why it counts.
        log: Lines of the kernel's log or else of the console, the oldest first.
        functions: Where the vCPUs stand, for a crash of which the log does not tell.
        trace: Functions of a reader's call trace, innermost first, where the log has no trace.
        message: What to call a crash of which the log does not tell; None: by its cause.
    """
    read = [name for name in map(_function, trace) if not _MACHINERY.fullmatch(name)]
    report = _find_report(log) if cause.kind in _LOGGED else None
    if report is None:
        detail = f": {normalise(cause.detail)}" if cause.kind == "console" else ""
        message, frames = message or f"{cause.kind}{detail}", read or list(functions)
    else:
        message, frames = _message(log[report]), list(_frames(log[report:])) or read
    frames = frames[:_FRAMES_KEPT]
    content = json.dumps([message, frames[:_FRAMES_COUNTED]]).encode()
    return Signature(hashlib.sha256(content).hexdigest()[:16], message, tuple(frames))


def report_of(log: Sequence[str]) -> Sequence[str]:
    """Return what a kernel said of its crash: from its first line to the end of its call trace.

    Args:
        log: Lines of the kernel's log or of the console, the oldest first.

    Returns:
        At most `_SHOWN_MAX` lines, without what begins each; none where it said nothing.
    """
    start = _find_report(log)
    if start is None:
        return ()
    shown: list[str] = []
    in_trace = False
    for line in log[start : start + _REPORT_LINES_MAX]:
        text = _STAMP.sub("", line.rstrip())
        if in_trace and not (
            _FRAME.match(text) or _POWERPC_FRAME.match(text) or _BETWEEN.match(text)
        ):
            break
        in_trace = in_trace or _TRACE.match(text) is not None
        shown.append(text)
        if len(shown) >= _SHOWN_MAX:
            break
    # Without a trace, the lines behind are of anything.
    return shown if in_trace else shown[:_REPORT_HEAD_LINES]


def report_of_directory(directory: Path) -> Sequence[str]:
    """Return what a kernel said of its crash, as the log or the console in a directory has it."""
    for name in _LOGS:
        try:
            with (directory / name).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_BYTES_MAX))
                text = file.read(_LOG_BYTES_MAX).decode("utf-8", "replace")
        except OSError:
            continue
        if found := report_of(text.splitlines()):
            return found
    return ()


def _find_report(log: Sequence[str]) -> int | None:
    """Return the line that says best what happened last."""
    last = next((i for i in range(len(log) - 1, -1, -1) if _PANIC.search(log[i])), None)
    if last is None:
        return _last_report(log, len(log))
    panic = _PANIC.search(log[last])
    if panic is not None and _SECONDARY.match(panic["why"]):
        earlier = _last_report(log, last)
        return last if earlier is None else earlier
    return last


def _last_report(log: Sequence[str], end: int) -> int | None:
    # A report has several such lines, the first of which says most.
    found = None
    for index in range(end - 1, max(-1, end - 1 - _REPORT_LINES_MAX), -1):
        if _REPORT.search(log[index]):
            if found is not None and not _is_of_one_report(log, index, found):
                break
            found = index
    return found


def _is_of_one_report(log: Sequence[str], first: int, second: int) -> bool:
    moments = [
        float(stamp[1]) for line in (log[first], log[second]) if (stamp := _STAMP.match(line))
    ]
    apart = max(moments, default=0.0) - min(moments, default=0.0)
    return second - first <= _REPORT_HEAD_LINES and apart <= _REPORT_HEAD_SECONDS


def _message(line: str) -> str:
    text = _STAMP.sub("", line)
    panic = _PANIC.search(text)
    return normalise(panic["why"] if panic else text)


def _frames(log: Sequence[str]) -> Iterator[str]:
    in_trace = False
    for line in log[:_REPORT_LINES_MAX]:
        text = _STAMP.sub("", line)
        if not in_trace and (counter := _COUNTER.match(text)):
            yield _function(counter["name"])
        elif _TRACE.match(text):
            in_trace = True
        elif in_trace:
            frame = _POWERPC_FRAME.match(text) or _FRAME.match(text)
            if frame is None and not _BETWEEN.match(text):
                return
            if frame is not None and not frame.groupdict().get("unsure"):
                name = _function(frame["name"])
                if not _MACHINERY.fullmatch(name):
                    yield name


def _function(name: str) -> str:
    return _COMPILER_SUFFIX.sub("", name)
