"""What a command line of QEMU says of its guest and of the ways to it. No I/O.

Only what is needed to tell guests and sockets apart; whatever is not understood is passed over.

Source: QEMU qemu-options.hx, util/qemu-option.c, chardev/char.c (qemu_chr_parse_compat) and
util/qemu-config.c (the file of -readconfig).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace

from qemu_dump_ext.qemu.address import format_tcp_address
from qemu_dump_ext.untrusted import parse_unsigned
from qemu_dump_ext.value import Value

QMP, HMP, GDBSTUB, OTHER = "qmp", "hmp", "gdbstub", "other"
"""What a channel of QEMU's speaks."""
PTY = "pty"

_GDB_PORT = 1234
_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"(\d{1,20})([bkmgtpe]?)i?b?", re.IGNORECASE)
_TCP = re.compile(r"(?P<host>\[[^]]*]|[^:,\[]*):(?P<port>\d{1,5})(?:,|$)")
_SECTION = re.compile(r'\s*\[\s*([\w-]{1,63})(?:\s+"([^"]{0,200})")?\s*]\s*')
_SETTING = re.compile(r'\s*([\w.-]{1,200})\s*=\s*"([^"]*)"\s*')
# Every other option has a word behind it.
_ALONE = frozenset(
    (
        *("S", "alt-grab", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-kvm"),
        *("enable-sync-profile", "full-screen", "h", "help", "mem-prealloc", "no-acpi"),
        *("no-fd-bootchk", "no-frame", "no-hpet", "no-kvm", "no-quit", "no-reboot"),
        *("no-shutdown", "no-user-config", "nodefaults", "nodefconfig", "nographic"),
        *("old-param", "only-migratable", "portrait", "preconfig", "s", "sdl", "semihosting"),
        *("singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach"),
        *("xen-domid-restrict",),
    )
)

Options = Mapping[str, str]


class Channel(Value):
    """A character device of QEMU's, and what is spoken there.

    Attributes:
        use: `qmp`, `hmp`, `gdbstub` or `other`, such as a serial console.
        backend: `unix`, `tcp`, `pty`, `stdio` or another of QEMU's words.
        path: Of a unix socket, as QEMU sees it; begins with `@` where it is abstract.
        host: Of a TCP socket.
        port: Of a TCP socket.
        descriptor: Number of an inherited socket, or None.
        listens: QEMU waits for clients there; it connects to somebody itself otherwise.
        telnet: Clients are to speak telnet.
        device: QEMU's name of it, or "".
    """

    use: str
    backend: str
    path: str | None = None
    host: str = ""
    port: int = 0
    descriptor: int | None = None
    listens: bool = False
    telnet: bool = False
    device: str = ""

    @property
    def address(self) -> str | None:
        """Return the path or HOST:PORT, as QEMU's command line has it, or None."""
        if self.backend == "tcp":
            return format_tcp_address(self.host or "localhost", self.port)
        return self.path


class CommandLine(Value):
    """What one command line says; None and "" where it says nothing.

    Attributes:
        name: Of the guest.
        uuid: Of the guest.
        identifier: By which its manager knows it (`-id` of Proxmox).
        machine: Type of the machine.
        accelerator: Such as `kvm`.
        memory: Bytes of RAM at the start.
        vcpus: How many at the start.
        kernel: Path of the kernel that QEMU boots, as QEMU sees it.
        incoming: From where it is migrated.
        pid_file: As QEMU sees it.
        channels: All that are declared.
        configurations: Paths of files of -readconfig that were not read.
    """

    name: str = ""
    uuid: str = ""
    identifier: str = ""
    machine: str = ""
    accelerator: str = ""
    memory: int | None = None
    vcpus: int | None = None
    kernel: str | None = None
    incoming: str | None = None
    pid_file: str | None = None
    channels: Sequence[Channel] = ()
    configurations: Sequence[str] = ()


def parse_command_line(
    words: Sequence[str], read_file: Callable[[str], str | None] = lambda _path: None
) -> CommandLine:
    """Return what a command line says.

    Args:
        words: Behind the name of the program.
        read_file: Gets a path of -readconfig; returns the text of the file, or None.
    """
    reading = _Reading()
    for option, value in _pairs(words):
        if option == "readconfig":
            reading.read_configuration(value, read_file(value))
        else:
            reading.take(option, value)
    return reading.result()


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            continue  # the image of a disk
        option = word[1:].removeprefix("-")
        yield option, "" if option in _ALONE else next(rest, "")


def parse_options(text: str, implied: str = "") -> dict[str, str]:
    """Return the options of a text like `first,key=value,flag`; the last of a name counts.

    Args:
        text: Where `,,` is a comma in a value.
        implied: Name of the first one where it has none.
    """
    found: dict[str, str] = {}
    for index, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            found[key] = value
        elif index == 0 and implied:
            found[implied] = key
        elif key.startswith("no"):  # as in `nowait`
            found[key.removeprefix("no")] = "off"
        elif key:
            found[key] = "on"
    return found


def parse_size(text: str) -> int | None:
    """Return a size in bytes; without a suffix, MiB are meant, as in `-m`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    return int(match[1]) << _SUFFIXES[match[2].lower() or "m"]


@dataclasses.dataclass
class _Reading:
    # What has been read so far; a later option overrides an earlier one.
    known: CommandLine = field(default_factory=CommandLine)
    devices: dict[str, Channel] = field(default_factory=dict)
    channels: list[Channel] = field(default_factory=list)
    used: list[tuple[str, str]] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)

    def take(self, option: str, value: str) -> None:
        handler = _HANDLERS.get(option)
        if handler is not None:
            handler(self, value)
        self.flags.add(option)

    def know(self, **changes: object) -> None:
        told = {name: value for name, value in changes.items() if value not in {None, ""}}
        self.known = replace(self.known, **told)  # type: ignore[arg-type]

    def read_configuration(self, path: str, text: str | None) -> None:
        if text is None:
            self.know(configurations=(*self.known.configurations, path))
            return
        for kind, name, options in _sections(text):
            handler = _SECTIONS.get(kind)
            if handler is not None:
                handler(self, {"id": name, **options} if name else options)

    def declare(self, options: Options) -> None:
        """Know a device of -chardev."""
        name = options.get("id", "")
        self.devices[name] = replace(_of_options(options), device=name)

    def use(self, use: str, device: str) -> None:
        """Know that a device of -chardev is used for something; it may be declared later."""
        self.used.append((use, device))

    def use_device(self, use: str, text: str) -> None:
        """Know a device as -monitor, -serial and the like have it."""
        if text.startswith("mon:"):
            use, text = HMP, text.removeprefix("mon:")
        if text.startswith("chardev:"):
            self.use(use, text.removeprefix("chardev:"))
        elif text not in {"none", "null", ""}:
            self.channels.append(replace(_of_text(text), use=use))

    def result(self) -> CommandLine:
        if "nographic" in self.flags and not self.flags & {"nodefaults", *_MONITOR_OPTIONS}:
            self.channels.append(Channel(HMP, "stdio"))
        # A device that a monitor shares with a console speaks both: what counts is the monitor.
        uses: dict[str, str] = {}
        for use, device in self.used:
            if uses.get(device, OTHER) == OTHER:
                uses[device] = use
        declared = [
            replace(device, use=uses.get(name, OTHER)) for name, device in self.devices.items()
        ]
        return replace(self.known, channels=(*declared, *self.channels))


_MONITOR_OPTIONS = frozenset(("monitor", "mon", "qmp", "qmp-pretty"))
_Handler = Callable[[_Reading, str], None]


def _of_options(options: Options) -> Channel:
    """Return the device of `-chardev`, or of a section of its name."""
    backend = options.get("backend", "")
    if backend != "socket":
        return Channel(OTHER, backend, path=options.get("path"))
    listens = options.get("server", "off") in {"on", "yes", "true", "y"}
    telnet = options.get("telnet", "off") == "on" or options.get("tn3270", "off") == "on"
    descriptor = parse_unsigned(options.get("fd", ""), bits=31)
    if "port" in options:
        port = parse_unsigned(options["port"], bits=16) or 0
        host = options.get("host", "").removeprefix("[").removesuffix("]")
        return Channel(OTHER, "tcp", None, host, port, descriptor, listens, telnet)
    path = options.get("path")
    if path is not None and options.get("abstract", "off") == "on":
        path = f"@{path}"
    return Channel(OTHER, "unix", path, descriptor=descriptor, listens=listens, telnet=telnet)


def _of_text(text: str) -> Channel:
    """Return the device of `unix:PATH,server=on`, `tcp:HOST:PORT`, `pty` and the like."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return _of_options({"backend": "socket", **parse_options(rest, "path")})
    if kind in {"tcp", "telnet", "websocket", "tn3270"} and (match := _TCP.match(rest)):
        options = {"backend": "socket", **parse_options(rest[match.end() :])}
        options |= {"host": match["host"], "port": match["port"]}
        return _of_options(options | ({"telnet": "on"} if kind == "telnet" else {}))
    return Channel(OTHER, kind.partition(",")[0])


def _sections(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield kind, name and settings of each section of a file of -readconfig."""
    kind, name, settings = "", "", dict[str, str]()
    for line in text.splitlines():
        if header := _SECTION.fullmatch(line):
            if kind:
                yield kind, name, settings
            kind, name, settings = header[1], header[2] or "", {}
        elif setting := _SETTING.fullmatch(line):
            settings[setting[1]] = setting[2]
    if kind:
        yield kind, name, settings


def _name(reading: _Reading, options: Options) -> None:
    reading.know(name=options.get("guest"))


def _machine(reading: _Reading, options: Options) -> None:
    accelerator = options.get("accel", "").partition(":")[0]
    reading.know(machine=options.get("type"), accelerator=accelerator, kernel=options.get("kernel"))


def _memory(reading: _Reading, options: Options) -> None:
    reading.know(memory=parse_size(options.get("size", "")))


def _vcpus(reading: _Reading, options: Options) -> None:
    count = parse_unsigned(options.get("cpus", ""), bits=16)
    parts = ("sockets", "dies", "clusters", "cores", "threads")
    if count is None and any(part in options for part in parts):
        count = 1
        for part in parts:
            count *= parse_unsigned(options.get(part, "1"), bits=16) or 1
    reading.know(vcpus=count)


def _monitor(reading: _Reading, options: Options) -> None:
    use = QMP if options.get("mode", "readline") == "control" else HMP
    reading.use(use, options.get("chardev", ""))
    reading.flags.add("mon")


def _gdb(reading: _Reading, text: str) -> None:
    before = len(reading.channels)
    reading.use_device(GDBSTUB, text)
    # It waits for debuggers whatever is said of it.
    reading.channels[before:] = [replace(new, listens=True) for new in reading.channels[before:]]


def _parsed(handler: Callable[[_Reading, Options], None], implied: str) -> _Handler:
    return lambda reading, text: handler(reading, parse_options(text, implied))


def _accelerator(reading: _Reading, options: Options) -> None:
    reading.know(accelerator=options.get("accel"))


_HANDLERS: Mapping[str, _Handler] = {
    "name": _parsed(_name, "guest"),
    "uuid": lambda reading, text: reading.know(uuid=text),
    "id": lambda reading, text: reading.know(identifier=text),
    "M": _parsed(_machine, "type"),
    "machine": _parsed(_machine, "type"),
    "accel": _parsed(_accelerator, "accel"),
    "enable-kvm": lambda reading, _text: reading.know(accelerator="kvm"),
    "m": _parsed(_memory, "size"),
    "smp": _parsed(_vcpus, "cpus"),
    "kernel": lambda reading, text: reading.know(kernel=text),
    "incoming": lambda reading, text: reading.know(incoming=text),
    "pidfile": lambda reading, text: reading.know(pid_file=text),
    "chardev": _parsed(_Reading.declare, "backend"),
    "mon": _parsed(_monitor, "chardev"),
    "monitor": lambda reading, text: reading.use_device(HMP, text),
    "qmp": lambda reading, text: reading.use_device(QMP, text),
    "qmp-pretty": lambda reading, text: reading.use_device(QMP, text),
    "serial": lambda reading, text: reading.use_device(OTHER, text),
    "parallel": lambda reading, text: reading.use_device(OTHER, text),
    "debugcon": lambda reading, text: reading.use_device(OTHER, text),
    "gdb": _gdb,
    "s": lambda reading, _text: _gdb(reading, f"tcp::{_GDB_PORT}"),
}
_SECTIONS: Mapping[str, Callable[[_Reading, Options], None]] = {
    "name": _name,
    "machine": _machine,
    "accel": _accelerator,
    "memory": _memory,
    "smp-opts": _vcpus,
    "chardev": _Reading.declare,
    "mon": _monitor,
}
