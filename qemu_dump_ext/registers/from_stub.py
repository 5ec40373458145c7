"""Registers by packets of the gdbstub, independent of what the debugger knows of the target.

A debugger wants to be told byte order and architecture before it shows a register, hides some
behind pseudo registers, and cuts others. The packets do neither: the stub describes its registers
itself, and sends each as bytes.

Source: GDB manual, appendix Remote Protocol (qXfer:features:read, p, g) and Target Descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import Stub
from qemu_dump_ext.structures.c_struct import Abi, StructLayout
from qemu_dump_ext.untrusted import parse_bytes, parse_unsigned
from qemu_dump_ext.value import Value

_CHUNK = 0xF00  # QEMU's packets hold 4096 bytes
_MAX_DESCRIPTION_SIZE = 1 << 20
"""Letters of all documents of a target description; QEMU's largest has 60 thousand."""
_MAX_DOCUMENTS = 64
_MAX_REGISTER_SIZE = 1 << 16
"""Bytes that a packet answers, at most."""
# Linear in the length of the text, whatever that is.
_ELEMENT = re.compile(r"<(reg|xi:include)\s([^<>]{0,1000})>")
_ATTRIBUTE = re.compile(r"(?<![\w:])([\w:]+)\s{0,9}=\s{0,9}[\"']([^\"']*)[\"']")


class StubVcpu(Value):
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
    left = _MAX_DESCRIPTION_SIZE
    for document in documents:
        text = _read_document(stub, document, left)
        left -= len(text)
        for element, attributes in _ELEMENT.findall(_without_comments(text)):
            values = dict(_ATTRIBUTE.findall(attributes))
            if element == "xi:include":
                # QEMU nests only one deep; what was included already leads in a circle.
                if (included := values.get("href", "")) not in documents:
                    documents.append(included)
                if len(documents) > _MAX_DOCUMENTS:
                    raise SourceError("the target description of the stub never ends")
            elif "name" in values:
                yield values["name"], parse_unsigned(values.get("regnum", ""), bits=32)


def _without_comments(text: str) -> str:
    first, *others = text.split("<!--")
    return first + "".join(part.partition("-->")[2] for part in others)


def _read_document(stub: Stub, name: str, most: int) -> str:
    parts: list[str] = []
    size = 0
    while size < most:
        reply = stub.packet(f"qXfer:features:read:{name}:{size:x},{_CHUNK:x}")
        if reply[:1] not in {"m", "l"}:
            break  # no target description
        parts.append(reply[1:])
        size += len(reply) - 1
        if reply[0] == "l" or len(reply) == 1:
            break
    else:
        raise SourceError(f"the target description of the stub is too long: {name}")
    return "".join(parts)


def _value(reply: str) -> bytes:
    # "" where the stub has no such packet, E01 for an error, x for unknown digits.
    return parse_bytes(reply, most=_MAX_REGISTER_SIZE) or b""


def _split_g_packet(data: bytes, layout: StructLayout | None) -> dict[str, bytes]:
    if layout is None:
        return {}
    sizes = {field.name: field.count for field in layout.fields}
    structure = layout.bind(Abi("little", word_size=4, max_align=1))
    if len(data) != structure.size:
        return {}  # of another version of QEMU, or of a CPU with other registers
    return {name: data[offset : offset + sizes[name]] for name, offset in structure.offsets.items()}
