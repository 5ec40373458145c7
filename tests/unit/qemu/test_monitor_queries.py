from __future__ import annotations

import pytest

from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.qemu.monitor_queries import (
    find_devices,
    find_machine_objects,
    read_byte_order,
    read_property,
    read_register_texts,
)

_TREE = {
    "qom-list /": "type (string)\nobjects (child<container>)\nmachine (child<raspi3b-machine>)\n",
    "qom-list /machine": "firmware (string)\nx (child<irq>)\nsoc (child<bcm2837>)\n",
    "qom-list /machine/soc": "fb (child<bcm2835-fb>)\ncpu[0] (child<cortex-a53-arm-cpu>)\n",
    "qom-list /machine/peripheral": "vmcore (child<vmcoreinfo>)\n",
    "qom-get /machine/soc/cpu[0] aarch64": "true\n",
}


class _Monitor:
    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def execute(self, command: str) -> str:
        self.asked.append(command)
        return self._answers.get(command, "Error: no such thing\n")


def test_machine_and_cpu_are_found_without_asking_every_object():
    monitor = _Monitor(_TREE)
    found = find_machine_objects(monitor, ("-arm-cpu",))
    assert (found.machine_type, found.cpu_type, found.cpu_path) == (
        "raspi3b-machine",
        "cortex-a53-arm-cpu",
        "/machine/soc/cpu[0]",
    )
    assert "qom-list /machine/soc/fb" not in monitor.asked
    assert "qom-list /machine/x" not in monitor.asked


def test_a_tree_without_a_cpu_is_an_error():
    with pytest.raises(MonitorAnswerError, match="no CPU"):
        find_machine_objects(
            _Monitor({"qom-list /machine": "soc (child<bcm2837>)\n"}), ("-arm-cpu",)
        )


@pytest.mark.parametrize(
    ("word", "expected"), [("0x01020304", "big"), ("0x04030201", "little"), ("", None)]
)
def test_a_word_that_differs_from_both_ends_tells_the_byte_order(word: str, expected: str | None):
    zeros = "00000000: 0x00000000 0x00000000\n"
    answers = {
        "xp /32xw 0x0": zeros,
        "xp /128xb 0x0": "00000000: 0x00 0x00 0x00 0x00 0x00 0x00 0x00 0x00\n",
        "xp /32xw 0x1000": f"00001000: 0x11222211 {word}\n",
        "xp /128xb 0x1000": "00001000: 0x11 0x22 0x22 0x11 0x01 0x02 0x03 0x04\n",
    }
    assert read_byte_order(_Monitor(answers), [RamBlock(0, 1 << 25, "ram", 0)]) == expected


def test_nothing_behind_the_end_of_memory_is_asked_for():
    """QEMU refuses it, since memory of another bus may be there that cannot be read."""
    monitor = _Monitor({})
    assert read_byte_order(monitor, [RamBlock(0x1000, 0x2000, "ram", 0)]) is None
    assert monitor.asked[::2] == ["xp /32xw 0x1000", "xp /32xw 0x2000"]


def test_what_is_only_called_a_cpu_is_passed_over():
    tree = {
        "qom-list /machine": "cpus (child<container>)\ndrc (child<spapr-drc-cpu>)\n",
        "qom-list /machine/cpus": "thread[0] (child<power9_v2.0-powerpc64-cpu>)\n",
    }
    found = find_machine_objects(_Monitor(tree), ("-powerpc64-cpu",))
    assert found.cpu_path == "/machine/cpus/thread[0]"
    assert find_machine_objects(_Monitor(tree), ("-arm-cpu",)).cpu_type == "spapr-drc-cpu"


def test_a_tree_without_an_end_is_an_error():
    class Endless(_Monitor):
        def execute(self, command: str) -> str:
            self.asked.append(command)
            return "again (child<container>)\n"

    with pytest.raises(MonitorAnswerError):
        find_machine_objects(Endless({}), ("-arm-cpu",))


def test_devices_and_properties():
    monitor = _Monitor(_TREE)
    assert find_devices(monitor, "vmcoreinfo")
    assert not find_devices(monitor, "vmcore")
    assert read_property(monitor, "/machine/soc/cpu[0]", "aarch64") == "true"
    assert read_property(monitor, "/machine/soc/cpu[0]", "sve-max-vq") is None


def _vcpus(count: int) -> str:
    return "".join(f"{'* '[index > 0]} CPU #{index}: thread_id=1\n" for index in range(count))


def _registers(index: int) -> str:
    return f"\nCPU#{index}\nPC={index:08x}\n"


def test_one_vcpu_is_asked_for_as_every_qemu_understands_it():
    monitor = _Monitor({"info cpus": _vcpus(1), "info registers -a": _registers(0)})
    assert read_register_texts(monitor) == {0: "\nPC=00000000\n"}
    assert "info registers 0" not in monitor.asked


@pytest.mark.parametrize("count", [2, 40])
def test_several_vcpus_are_asked_for_one_by_one(count: int):
    answers = {f"info registers {index}": _registers(index) for index in range(count)}
    monitor = _Monitor({"info cpus": _vcpus(count), **answers})
    assert list(read_register_texts(monitor)) == list(range(count))
    assert "info registers -a" not in monitor.asked


def test_an_old_qemu_shows_all_vcpus_only():
    everything = "".join(map(_registers, range(9)))
    monitor = _Monitor({"info cpus": _vcpus(9), "info registers -a": everything})
    assert len(read_register_texts(monitor)) == 9
