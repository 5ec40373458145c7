"""Ask the monitor for what grows with the guest, in pieces.

QEMU sends each line of an answer through the gdbstub as a packet of its own, and gdb acknowledges
each; with some 600 of them in flight on a unix socket both sides wait for each other forever. So
the object tree is walked level by level, and not asked for at once by `info qom-tree`, and many
vCPUs are asked for one by one.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Mapping, Sequence

from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.guest.access import Monitor, execute_all
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.qemu.monitor_text import (
    parse_memory_size,
    parse_physical_bytes,
    parse_physical_memory,
    parse_vcpu_list,
    split_vcpus,
)
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.untrusted import parse_unsigned
from qemu_dump_ext.value import Value

VERSION = "info version"
MEMORY_SIZE = "info memory_size_summary"
VCPUS = "info cpus"
ROOTS = ("qom-list /", "qom-list /machine")
"""What `find_machine_objects` asks for in any case."""
_DEVICES = ("/machine/peripheral", "/machine/peripheral-anon")
DEVICES = tuple(f"qom-list {parent}" for parent in _DEVICES)
"""What `find_devices` asks."""
_CHILD = re.compile(r"^(?P<name>\S+) \(child<(?P<type>[^>]+)>\)$", re.MULTILINE)
_CPU_SUFFIX = "-cpu"
_ALL_REGISTERS = "info registers -a"
# Have no children that matter, and are many.
_LEAVES = frozenset(("irq", "memory-region", "qemu:memory-region", "clock", "or-irq", "split-irq"))
# Where boards keep their CPUs; everything else is looked through later.
_LIKELY = re.compile(r"unattached|soc|cpu|core|thread|hart|cluster|chip|mpu")
_MAX_OBJECTS = 2000
# Kernels lie somewhere in the first megabytes.
_WHERE_TO_LOOK = (0, *(1 << bit for bit in range(12, 25)))
_WORDS = 32


class MachineObjects(Value):
    """What the object tree tells.

    Attributes:
        machine_type: Of /machine, such as `pc-q35-7.2-machine`.
        cpu_type: Of a CPU, such as `max-arm-cpu`.
        cpu_path: Of that CPU.
    """

    machine_type: str
    cpu_type: str
    cpu_path: str


def find_machine_objects(monitor: Monitor, cpu_suffixes: tuple[str, ...]) -> MachineObjects:
    """Find the machine and one of its CPUs.

    Args:
        monitor: Of a stopped guest.
        cpu_suffixes: How the types of the CPUs end that are looked for. Where there is none,
            something that may be a CPU of another kind is returned, for the message.

    Raises:
        MonitorAnswerError: There is no CPU.
    """
    roots = _children(monitor, "/")
    machine_type = dict(roots).get("machine", "")
    waiting = [(0, 0, "/machine")]
    unknown: MachineObjects | None = None
    for count in range(1, _MAX_OBJECTS):
        if not waiting:
            break
        _, _, path = heapq.heappop(waiting)
        for name, kind in _children(monitor, path):
            found = MachineObjects(machine_type, kind, f"{path}/{name}")
            if kind.endswith(cpu_suffixes):
                return found
            if kind.endswith(_CPU_SUFFIX):
                unknown = unknown or found
            if kind not in _LEAVES:
                unlikely = _LIKELY.search(f"{name} {kind}") is None
                heapq.heappush(waiting, (int(unlikely), count, f"{path}/{name}"))
    if unknown is not None:
        return unknown
    raise MonitorAnswerError("qom-list /machine", "there is no CPU in it")


def read_memory_size(monitor: Monitor) -> int | None:
    """Return the bytes of RAM that the guest has, or None where QEMU does not tell."""
    return parse_memory_size(monitor.execute(MEMORY_SIZE))


def find_devices(monitor: Monitor, type_pattern: str) -> list[str]:
    """Return the paths of devices that were added with -device, by a pattern of their types."""
    return [
        f"{parent}/{name}"
        for parent in _DEVICES
        for name, kind in _children(monitor, parent)
        if re.fullmatch(type_pattern, kind)
    ]


def read_property(monitor: Monitor, path: str, name: str) -> str | None:
    """Return a property as text, or None where the object has none of this name."""
    answer = monitor.execute(f"qom-get {path} {name}").strip()
    # QEMU before 5.1 has no such command.
    return None if not answer or answer.startswith(("Error", "unknown command")) else answer


def read_number(monitor: Monitor, path: str, name: str) -> int | None:
    """Return a property as a number, or None where it is none, or the object has none such."""
    text = read_property(monitor, path, name)
    return parse_unsigned(text) if text else None


def read_byte_order(monitor: Monitor, blocks: Sequence[RamBlock]) -> ByteOrder | None:
    """Return the byte order in which the monitor puts words of guest memory together.

    Args:
        monitor: Of a stopped guest.
        blocks: Memory; some of each is looked at.

    Returns:
        None where no word tells: it reads the same from both ends.
    """
    for block in blocks:
        for offset in _WHERE_TO_LOOK:
            if offset + 4 * _WORDS > block.size:
                break
            place = f"{block.gpa + offset:#x}"
            questions = f"xp /{_WORDS}xw {place}", f"xp /{4 * _WORDS}xb {place}"
            text, bytes_text = execute_all(monitor, questions)
            words, data = parse_physical_memory(text, 32), parse_physical_bytes(bytes_text)
            for number, word in enumerate(words):
                stored = data[4 * number : 4 * number + 4]
                if stored != stored[::-1]:
                    return "big" if int.from_bytes(stored, "big") == word else "little"
    return None


def read_register_texts(monitor: Monitor) -> Mapping[int, str]:
    """Return `info registers` of each vCPU by cpu_index.

    Of each by a question of its own: RISC-V has 280 lines for each since QEMU 11, and long answers
    block the gdbstub.

    Raises:
        MonitorAnswerError: The monitor shows none.
    """
    indexes = parse_vcpu_list(monitor.execute(VCPUS))
    texts: dict[int, str] = {}
    for text in execute_all(monitor, register_questions(indexes)):
        texts |= split_vcpus(text)
    if len(indexes) > 1 and len(texts) != len(indexes):
        # This QEMU does not take the number of a vCPU.
        text = monitor.execute(_ALL_REGISTERS)
        texts = split_vcpus(text)
    if not texts:
        raise MonitorAnswerError(_ALL_REGISTERS, text)
    return texts


def register_questions(indexes: Collection[int]) -> list[str]:
    """Return what `read_register_texts` asks where there are vCPUs of these cpu_index."""
    if len(indexes) > 1:
        return [f"info registers {index}" for index in indexes]
    return [_ALL_REGISTERS]


def _children(monitor: Monitor, path: str) -> list[tuple[str, str]]:
    found = _CHILD.findall(monitor.execute(f"qom-list {path}"))
    return [(name, kind) for name, kind in found]
