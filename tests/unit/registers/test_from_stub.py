from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.registers.from_stub import read_stub_registers


class _Stub:
    """Answers with documents and registers; of what it has not, with nothing."""

    def __init__(self, documents: Mapping[str, str], registers: Mapping[str, str]) -> None:
        self._documents = documents
        self._registers = registers
        self.asked: list[str] = []

    def addresses(self) -> Sequence[str]:
        return ()

    def packet(self, text: str) -> str:
        self.asked.append(text)
        if not text.startswith("qXfer:features:read:"):
            return self._registers.get(text, "")
        name, _, place = text.removeprefix("qXfer:features:read:").rpartition(":")
        start, size = (int(number, 16) for number in place.split(","))
        document = self._documents.get(name)
        if document is None:
            return ""
        part = document[start : start + size]
        return ("m" if start + size < len(document) else "l") + part

    def read(self, address: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        pass

    def vcpus(self) -> Iterator[int]:
        yield 0


def registers_of(documents: Mapping[str, str], registers: Mapping[str, str]) -> Mapping[str, bytes]:
    stub = _Stub(documents, registers)
    (vcpu,) = read_stub_registers(stub, {"a", "b", "c"}, None)
    assert len(stub.asked) < 400
    return vcpu.registers


def test_registers_are_numbered_on_through_includes():
    documents = {
        "target.xml": '<target><xi:include href="x.xml"/><xi:include href="y.xml"/></target>',
        "x.xml": '<reg name="a" bitsize="32"/><!-- <reg name="c"/> --><reg name="other"/>',
        "y.xml": "<reg\n name='b' regnum=\"16\"/><reg name='c'/>",
    }
    values = registers_of(documents, {"p0": "00112233", "p10": "ff", "p11": "44"})
    assert values == {"a": b"\x00\x11\x22\x33", "b": b"\xff", "c": b"\x44"}


def test_includes_in_a_circle_end():
    documents = {
        "target.xml": '<xi:include href="x.xml"/><reg name="a"/>',
        "x.xml": '<xi:include href="target.xml"/><xi:include href="x.xml"/><reg name="b"/>',
    }
    assert registers_of(documents, {"p0": "01", "p1": "02"}) == {"a": b"\x01", "b": b"\x02"}


def test_includes_without_end_are_refused():
    class Endless(dict[str, str]):
        def get(self, name: str, _default: object = None) -> str:
            return f'<xi:include href="{name}0"/><xi:include href="{name}1"/>'

    with pytest.raises(SourceError, match="never ends"):
        registers_of(Endless(), {})


def test_a_description_of_any_length_is_refused():
    with pytest.raises(SourceError, match="too long"):
        registers_of({"target.xml": '<reg name="x"/>' * (1 << 17)}, {})


@pytest.mark.parametrize("piece", ["<!--", "<reg ", "<reg a", "<reg name=", "a" * 99, "<reg a:b a"])
def test_a_description_that_makes_no_sense_takes_no_time(piece: str):
    """Each would be looked through from every beginning to the end: for minutes."""
    text = '<reg name="a"/>' + piece * ((900 << 10) // len(piece))
    assert registers_of({"target.xml": text}, {"p0": "01"}) == {"a": b"\x01"}


@pytest.mark.parametrize("number", ["9" * 900, "-1", "4294967296", "x", "٣", ""])
def test_an_impossible_number_counts_as_none(number: str):
    documents = {"target.xml": f'<reg name="a" regnum="{number}"/>'}
    assert registers_of(documents, {"p0": "01"}) == {"a": b"\x01"}


@pytest.mark.parametrize("reply", ["E01", "xxxxxxxx", "0", "0g", "00 11", "٣٣", "00" * (1 << 17)])
def test_a_reply_that_is_no_value_is_no_register(reply: str):
    assert registers_of({"target.xml": '<reg name="a"/>'}, {"p0": reply}) == {}
