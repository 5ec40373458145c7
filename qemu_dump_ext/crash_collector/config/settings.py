"""What a configuration may say; `file` reads one.

Its words are the attributes of the classes below, from `Configuration` on; `defaults` has any of
the `Settings`, and each entry of `guests`, too, beside what says which guests it is about.
"""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from qemu_dump_ext.crash_collector.config.quantities import (
    AbsolutePath,
    Count,
    FilePath,
    GuestTemplate,
    KernelTemplate,
    Number,
    PathText,
    Pattern,
    Seconds,
    Size,
    template,
)
from qemu_dump_ext.crash_collector.record import CauseKind
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.plan.request import DUMP_LEVEL_MAX, DumpRequest
from qemu_dump_ext.value import Value

# What knows formats and memory sources is imported where a configuration names one: most commands
# need none of it, and it takes longer to import than all else.
_AUTO = "auto"

_NO_MORE = ConfigDict(extra="forbid", frozen=True)

DEFAULT_CAUSES: tuple[CauseKind, ...] = (
    "guest-panicked",
    "crashloaded",
    "watchdog",
    "memory-failure",
    "internal-error",
    "io-error",
    "console",
    "no-progress",
    "trigger",
    "qemu-died",
)
"""All but `shutdown` and `reset`, which healthy guests do as well."""

_CONSOLE_PATTERNS = (
    r"Kernel panic",
    r"Oops",
    r"\bBUG:",
    r"soft lockup",
    r"rcu_\w+ self-detected stall",
)


_OF_CACHE = (
    r"^_*filemap_",
    r"^_*(?:find|add|read|grab|write)_\w*(?:cache_|page|folio)",
    r"pagecache|page_cache|readahead|writeback|writepage",
    r"^_*(?:truncate|invalidate)_(?:inode|mapping|page)",
    r"^_*(?:block|buffer|iomap|mpage|generic_file|generic_perform|shmem|simple_write)_",
    r"^_*(?:ext4|xfs|btrfs|f2fs|jbd2|nfs|squashfs|isofs|fat|ntfs3|erofs)_",
)
_OF_PROGRAMS = (
    r"^_*handle_mm_fault",
    r"^_*do_(?:anonymous|swap|wp|huge_pmd|numa)_",
    r"^_*(?:zap|unmap|copy|move|mprotect|madvise|mremap|migrate)_(?:page|pte|pmd|vma|range)",
    r"^_*(?:khugepaged|ksm|hugetlb|swap|userfaultfd|try_to_unmap|rmap_walk|get_user_pages)",
)
_OF_FREE_PAGES = (
    r"^_*(?:alloc|free)_(?:frozen_)?pages?",
    r"free_(?:unref|pcp|one)_?pages?|get_page_from_freelist|rmqueue|bad_page|compact_zone",
    r"^_*(?:kasan_|slub_|slab_|kfree|kmem_cache_(?:alloc|free)|check_(?:new|free)_page)",
)


def _parse_format(name: str) -> str:
    from qemu_dump_ext.dump_formats import find_dump_format  # noqa: PLC0415 - see above

    try:
        find_dump_format(name).require(DumpRequest(format=name))
    except RequestError as error:
        raise ValueError(str(error)) from error
    return name


def _parse_memory(name: str) -> str:
    from qemu_dump_ext.memory_sources import all_memory_sources  # noqa: PLC0415 - see above

    known = (_AUTO, *all_memory_sources())
    if name not in known:
        raise ValueError(f"memory is one of {', '.join(known)}")
    return name


class Rate(Value):
    """At most so many dumps of one guest in so many seconds.

    More crashes are recorded without a dump, and above ten times as many only counted.

    Attributes:
        dumps: How many dumps of one guest are taken within `per`.
        per: The time in which dumps are counted.
    """

    __pydantic_config__ = _NO_MORE

    dumps: Annotated[Count, Field(ge=1)] = 6
    per: Seconds = 3600.0


class Heartbeat(Value):
    """How it is noticed that a guest makes no progress.

    Attributes:
        by: `program-counters`: the registers of all vCPUs are the same whenever they are looked
            at; `guest-agent`: the agent in the guest, once it has answered, answers no more.
        interval: How often the guest is looked at.
        after: How long a guest must have shown no progress to count as crashed.
        socket: The socket of the guest agent; `{name}`, `{stem}` and `{directory}` are those of
            the guest.
    """

    __pydantic_config__ = _NO_MORE

    by: Literal["program-counters", "guest-agent"]
    interval: Seconds = 10.0
    after: Seconds = 120.0
    socket: GuestTemplate | None = None

    @model_validator(mode="after")
    def _check(self) -> Heartbeat:
        if (self.by == "guest-agent") != (self.socket is not None):
            raise ValueError("`socket` belongs to `by: guest-agent`, and to nothing else")
        return self


class AfterCommand(Value):
    """Run a program when a crash is stored, with CRASH_DIRECTORY and others in its environment.

    Attributes:
        command: The program and its arguments.
        timeout: How long the program may take; it is ended then.
    """

    __pydantic_config__ = _NO_MORE

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    timeout: Seconds = 600.0


class Notification(Value):
    """Who is told of crashes: a program, or a webhook; exactly one of them.

    Attributes:
        on: Of which crashes: `new` signatures, `regression`s (resolved ones that come back), `all`.
        command: A program and its arguments; the facts are JSON on its standard input, and
            CRASH_WHY, CRASH_TEXT and others in its environment.
        webhook: An http or https URL, to which the facts are posted as JSON; `text` in it is a line
            for people.
        timeout: How long one attempt may take.
        retry: How soon an attempt that failed is made again; after each failure twice as late.
        retry_max: How late an attempt that failed is made again at most.
        attempts: How often it is tried.
    """

    __pydantic_config__ = _NO_MORE

    on: Annotated[tuple[Literal["new", "regression", "all"], ...], Field(min_length=1)] = (
        "new",
        "regression",
    )
    command: tuple[str, ...] = ()
    webhook: Annotated[PathText, Field(pattern="^https?://")] | None = None
    timeout: Seconds = 30.0
    retry: Seconds = 5.0
    retry_max: Seconds = 900.0
    attempts: Annotated[Count, Field(ge=1, le=10_000)] = 100

    @model_validator(mode="after")
    def _check(self) -> Notification:
        if bool(self.command) == (self.webhook is not None):
            raise ValueError("a notification has one of `command` and `webhook`")
        return self


AfterStep: TypeAlias = Literal["leave", "resume", "reset", "quit"] | AfterCommand


def _as_steps(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


class Symbols(Value):
    """Where the guest kernel's symbols are; `{release}` is the kernel's release.

    Attributes:
        system_map: The kernel's System.map, which names the functions at which the vCPUs stand
            where neither the kernel's log nor drgn names any, nor the kernel's own memory.
        vmlinux: The kernel's vmlinux with DWARF, for crash and drgn; drgn names the functions of
            the crash by it, where the kernel's log names none.
    """

    __pydantic_config__ = _NO_MORE

    system_map: KernelTemplate | None = None
    vmlinux: KernelTemplate | None = None


class Keep(Value):
    """What stays in a dump for where the crash is, though `dump_level` leaves it out.

    Each is a list of regular expressions: one of them is found in one of the first functions of the
    crash's call trace. None at all: it never stays.

    Attributes:
        cache: Functions for which the page cache stays: 2 and 4 are taken from the dump level.
        user: Functions for which the memory of programs stays: 8 is taken from it.
        free: Functions for which free pages stay: 16 is taken from it.
    """

    __pydantic_config__ = _NO_MORE

    cache: tuple[Pattern, ...] = tuple(map(re.compile, _OF_CACHE))
    user: tuple[Pattern, ...] = tuple(map(re.compile, _OF_PROGRAMS))
    free: tuple[Pattern, ...] = tuple(map(re.compile, _OF_FREE_PAGES))


class Settings(Value):
    """What holds for a guest.

    Attributes:
        causes: What counts as a crash.
        format: The format of the dump, by the name that QMP has for it.
        level: The level of the page codec; low is fast, high is small.
        dump_level: Which pages are left out of the dump, as makedumpfile numbers them: 0 for none,
            31 for all that nobody will look for. All are kept where they cannot be told apart.
        keep: What stays in a dump, whatever `dump_level` says, for where the crash is.
        max_bytes: How large a dump may be: the lowest dump level is taken, from `dump_level` on, of
            which it is no larger, and a mini dump where it would be; without, any size.
        further_dumps: What is dumped of more crashes of one signature than `dumps_per_signature`:
            `none`; or `mini`, `smallest`: what triage needs, in 10 to 20 MB.
        memory: Where guest memory comes from, as `--memory` of the dump command has it.
        pause: How long a guest that runs stands still: `stop`, until all is taken; `snapshot`,
            until its memory is copied; `live`, for milliseconds, while QEMU streams it, where that
            is without any risk, or else as with `snapshot`.
        console: The file to which QEMU logs the console of the guest.
        console_patterns: Regular expressions; a new line of the console that one of them matches
            is a crash.
        heartbeat: How a guest is found that makes no progress; without, none is looked for.
        dumps_per_signature: How many dumps of crashes of the same signature are kept in the
            store; of more crashes, everything but the dump is stored.
        rate: How many dumps of each guest are taken at most.
        after: What is done when a crash is stored: with the guest, or `{command: [...]}`, a program
            that is run; or a list of these, one behind the other.
        labels: Any words and their values, which are stored with each crash.
        symbols: Where the symbols of the guest's kernel are.
        verify_with: Readers that must open a dump, beside our own verifier, before it is called
            verified.
    """

    __pydantic_config__ = _NO_MORE

    causes: tuple[CauseKind, ...] = DEFAULT_CAUSES
    format: Annotated[str, AfterValidator(_parse_format)] = "kdump-raw-zlib"
    level: Number | None = None
    dump_level: Annotated[Count, Field(le=DUMP_LEVEL_MAX)] = DUMP_LEVEL_MAX
    keep: Keep = field(default_factory=Keep)
    max_bytes: Annotated[Size, Field(ge=1)] | None = None
    further_dumps: Literal["none", "mini", "smallest"] = "none"
    memory: Annotated[str, AfterValidator(_parse_memory)] = _AUTO
    pause: Literal["stop", "snapshot", "live"] = "stop"
    console: GuestTemplate | None = None
    console_patterns: tuple[Pattern, ...] = tuple(map(re.compile, _CONSOLE_PATTERNS))
    heartbeat: Heartbeat | None = None
    dumps_per_signature: Count = 3
    rate: Rate = field(default_factory=Rate)
    after: Annotated[tuple[AfterStep, ...], BeforeValidator(_as_steps), Field(min_length=1)] = (
        "leave",
    )
    labels: dict[str, str] = field(default_factory=dict)
    symbols: Symbols = field(default_factory=Symbols)
    verify_with: tuple[Literal["crash", "drgn"], ...] = ()

    @model_validator(mode="after")
    def _check_level(self) -> Settings:
        if self.level is None:
            return self
        from qemu_dump_ext.dump_formats import find_dump_format  # noqa: PLC0415 - see above

        request = DumpRequest(format=self.format, level=self.level)
        try:
            find_dump_format(self.format).check(request)
            find_dump_format(self.format).require(request)
        except RequestError as error:
            raise ValueError(str(error)) from error
        return self


class GuestEntry(Settings):
    """One guest, or many; exactly one of the first seven.

    Attributes:
        socket: The path of a QMP socket, or HOST:PORT.
        glob: A pattern of paths of QMP sockets, which may come and go.
        directory: A directory in which every socket is a QMP socket.
        libvirt: URI of a connection of libvirt's, such as qemu:///system, of which every domain is
            watched that runs and whose name fits the pattern `name`; without, all.
        monitor: The human monitor of a guest without QMP: a path, HOST:PORT or a pty.
        guest: The name or UUID of a guest of this host, as `qemu-dump guests` shows them, which is
            watched by whatever monitor of it is free.
        pid: The PID of its QEMU, likewise.
        name: The name of the guest: `{stem}` is the name of the socket without what is behind its
            last dot, or what `guest` or `pid` say, `{directory}` that of the directory around it.
    """

    __pydantic_config__ = _NO_MORE

    socket: PathText | None = None
    glob: PathText | None = None
    directory: FilePath | None = None
    libvirt: PathText | None = None
    monitor: PathText | None = None
    guest: PathText | None = None
    pid: Annotated[Count, Field(ge=1)] | None = None
    name: Annotated[PathText, template("stem", "directory")] = "{stem}"

    @model_validator(mode="after")
    def _check(self) -> GuestEntry:
        places = (self.socket, self.glob, self.directory, self.libvirt)
        if sum(place is not None for place in (*places, self.monitor, self.guest, self.pid)) != 1:
            raise ValueError(
                "a guest has one of `socket`, `glob`, `directory`, `libvirt`, `monitor`, `guest`"
                " and `pid`"
            )
        return self


class Limits(Value):
    """What the store may take.

    Attributes:
        bytes: How much all crashes together may take; without, any.
        count: How many crashes are kept.
        age: How old a crash may become; without, any age.
        free: How much the file system of the store must have left.
    """

    __pydantic_config__ = _NO_MORE

    bytes: Size | None = None
    count: Annotated[Count, Field(ge=1)] | None = 1000
    age: Seconds | None = None
    free: Size = 1 << 30


class Upload(Value):
    """Where crashes are copied to once they are in the store.

    Attributes:
        url: A URL of any kind that fsspec knows; `{host}` is the name of this host.
        options: What fsspec takes besides, for such URLs: `key`, `username`, `endpoint_url`, ...
        confirm: How an upload is confirmed: `content` reads back what arrived and compares it,
            `size` compares sizes only.
        keep_dump: Whether the dump stays here when the upload is confirmed; the rest of the crash
            stays in any case.
        timeout: How long one attempt to upload one crash may take.
        retry: How soon an upload that failed is tried again; after each failure twice as late.
        retry_max: How late an upload that failed is tried again at most.
    """

    __pydantic_config__ = _NO_MORE

    url: Annotated[PathText, template("host"), Field(pattern="^[a-z][a-z0-9+.-]*://")]
    options: dict[str, Any] = field(default_factory=dict)
    confirm: Literal["content", "size"] = "content"
    keep_dump: bool = True
    timeout: Seconds = 3600.0
    retry: Seconds = 5.0
    retry_max: Seconds = 900.0


class Configuration(Value):
    """The whole configuration of an agent.

    Attributes:
        store: The directory in which crashes are stored, one directory each.
        guests: Which guests are watched, a list.
        control: The socket by which `qemu-crash-collector` talks to the agent; without, `.control`
            in the store.
        concurrent_dumps: How many dumps are taken at the same time.
        scan_interval: How often globs, directories and console logs are looked at.
        answer_timeout: How long QEMU may take to answer a command. A QEMU that is waited for
            longer altogether keeps no other crash waiting, and is asked for the most important
            only.
        collection_timeout: How long QEMU may be asked about one crash; what was not had by then
            is left out, the dump too, and the guest runs again.
        retry_interval: How soon a crash that could not be stored is collected again.
        limits: What the store may take.
        upload: Where crashes are copied to; without, nowhere.
        notify: Who is told of crashes, a list.
        report: The file of the report in HTML, written anew after each crash; without, a report
            is written only by `qemu-crash-collector report`.
        metrics_port: The port on 127.0.0.1 at which Prometheus finds the metrics; without, there
            are none.
        defaults: What holds for guests that do not say otherwise.
    """

    __pydantic_config__ = _NO_MORE

    store: AbsolutePath
    guests: tuple[GuestEntry, ...] = ()
    control: AbsolutePath | None = None
    concurrent_dumps: Annotated[int, Field(ge=1, le=64)] = 2
    scan_interval: Seconds = 1.0
    answer_timeout: Seconds = 60.0
    collection_timeout: Seconds = 900.0
    retry_interval: Seconds = 60.0
    limits: Limits = field(default_factory=Limits)
    upload: Upload | None = None
    notify: tuple[Notification, ...] = ()
    report: AbsolutePath | None = None
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    defaults: Settings = field(default_factory=Settings)

    @property
    def control_socket(self) -> Path:
        """Where the agent listens for commands."""
        return self.control or self.store / ".control"
