"""Registers by packets of the gdbstub, independent of what the debugger knows of the target.

A debugger wants to be told byte order and architecture before it shows a register, hides some
behind pseudo registers, and cuts others. The packets do neither: the stub describes its registers
itself, and sends each as bytes.

Source: GDB manual, appendix Remote Protocol (qXfer:features:read, p, g) and Target Descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import Stub
from qemu_dump_ext.structures.c_struct import Abi, StructLayout

_CHUNK = 0xF00  # QEMU's packets hold 4096 bytes
_MAX_DOCUMENT_SIZE = 4 << 20
_MAX_DOCUMENTS = 64


@dataclass(frozen=True)
class StubVcpu:
    """What the stub says of one vCPU.

    Attributes:
        index: QEMU's cpu_index.
        registers: Bytes as the stub sends them, by the stub's names.
    """

    index: int
    registers: Mapping[str, bytes]


def read_stub_registers(
    stub: Stub, names: Collection[str], g_packet: StructLayout | None
) -> Sequence[StubVcpu]:
    """Read registers of every vCPU.

    Args:
        stub: Connected, the guest stopped.
        names: Those that are wanted; others are left out, and so is what the stub has not.
        g_packet: Registers of a stub without target description, in the order of its `g` packet.

    Raises:
        SourceError: The stub does not answer.
    """
    numbers = {name: number for name, number in _register_numbers(stub).items() if name in names}
    vcpus = []
    for index in stub.vcpus():
        if numbers:
            values = {name: _value(stub.packet(f"p{number:x}")) for name, number in numbers.items()}
        else:
            values = _split_g_packet(_value(stub.packet("g")), g_packet)
        vcpus.append(StubVcpu(index, {name: value for name, value in values.items() if value}))
    return vcpus


def read_g_packet(stub: Stub, index: int) -> bytes:
    """Return the answer to `g` for the vCPU of this cpu_index; empty where there is none."""
    packets = [_value(stub.packet("g")) for found in stub.vcpus() if found == index]
    return packets[0] if packets else b""


def _register_numbers(stub: Stub) -> dict[str, int]:
    """Return the packet number of each register; the first of a name counts."""
    numbers: dict[str, int] = {}
    number = 0
    for name, explicit in _described_registers(stub):
        number = number if explicit is None else explicit
        numbers.setdefault(name, number)
        number += 1
    return numbers


def _described_registers(stub: Stub) -> Iterator[tuple[str, int | None]]:
    """Yield name and, where it is told, number of each register in the order of numbering."""
    documents = ["target.xml"]
    for count, document in enumerate(documents, 1):
        if count > _MAX_DOCUMENTS:
            raise SourceError("the target description of the stub never ends")
        text = re.sub(r"<!--.*?-->", "", _read_document(stub, document), flags=re.DOTALL)
        for element, attributes in re.findall(r"<(reg|xi:include)\s([^>]*?)/?>", text):
            values = dict(re.findall(r"([\w:]+)\s*=\s*[\"']([^\"']*)[\"']", attributes))
            if element == "xi:include":
                documents.append(values.get("href", ""))  # QEMU nests only one deep
            elif "name" in values:
                number = values.get("regnum", "")
                yield values["name"], int(number) if number.isdecimal() else None


def _read_document(stub: Stub, name: str) -> str:
    text = ""
    while len(text) < _MAX_DOCUMENT_SIZE:
        reply = stub.packet(f"qXfer:features:read:{name}:{len(text):x},{_CHUNK:x}")
        if reply[:1] not in {"m", "l"}:
            return text  # no target description
        text += reply[1:]
        if reply[0] == "l" or len(reply) == 1:
            return text
    raise SourceError(f"the target description of the stub is too long: {name}")


def _value(reply: str) -> bytes:
    # "" where the stub has no such packet, E01 for an error, x for unknown digits.
    try:
        return bytes.fromhex(reply)
    except ValueError:
        return b""


def _split_g_packet(data: bytes, layout: StructLayout | None) -> dict[str, bytes]:
    if layout is None:
        return {}
    sizes = {field.name: field.count for field in layout.fields}
    structure = layout.bind(Abi("little", word_size=4, max_align=1))
    if len(data) != structure.size:
        return {}  # of another version of QEMU, or of a CPU with other registers
    return {name: data[offset : offset + sizes[name]] for name, offset in structure.offsets.items()}
