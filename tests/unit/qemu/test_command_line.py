"""Command lines as QEMU's managers write them."""

from __future__ import annotations

import shlex

import pytest

from qemu_dump_ext.qemu.command_line import (
    Channel,
    CommandLine,
    parse_command_line,
    parse_options,
    parse_size,
)

_INCUS = """
# Machine
[machine]
type = "q35"
accel = "kvm"

[memory]
size = "1024M"

[smp-opts]
cpus = "2"

[chardev "monitor"]
backend = "socket"
path = "/run/incus/web1/qemu.monitor"
server = "on"
wait = "off"

[mon]
chardev = "monitor"
mode = "control"
"""


def parse(text: str) -> CommandLine:
    return parse_command_line(shlex.split(text), {"/run/incus/web1/qemu.conf": _INCUS}.get)


def listening(line: CommandLine) -> set[tuple[str, str | None]]:
    return {(channel.use, channel.address) for channel in line.channels if channel.listens}


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (  # virtme-ng --debug
            "-name virtme-ng -qmp tcp:localhost:3636,server,nowait -s -echr 1 -serial none",
            "virtme-ng",
            {("qmp", "localhost:3636"), ("gdbstub", "localhost:1234")},
        ),
        (  # Kata
            (
                "-name sandbox-8f3a,debug-threads=on -uuid 1a2b"
                " -qmp unix:/run/vc/vm/8f3a/qmp.sock,server=on,wait=off"
                " -qmp unix:/run/vc/vm/8f3a/extra.sock,server=on,wait=off -append -s"
            ),
            "sandbox-8f3a",
            {("qmp", "/run/vc/vm/8f3a/qmp.sock"), ("qmp", "/run/vc/vm/8f3a/extra.sock")},
        ),
        (  # Incus
            "-S -name web1 -uuid 1a2b -daemonize -nodefaults -readconfig /run/incus/web1/qemu.conf",
            "web1",
            {("qmp", "/run/incus/web1/qemu.monitor")},
        ),
        (  # libvirt, and what KubeVirt's virt-launcher starts
            (
                "-name guest=default_vm1,debug-threads=on -S -no-user-config -nodefaults"
                " -chardev socket,id=charmonitor,path=/var/lib/libvirt/m.sock,server=on,wait=off"
                " -mon chardev=charmonitor,id=monitor,mode=control"
            ),
            "default_vm1",
            {("qmp", "/var/lib/libvirt/m.sock")},
        ),
        (  # Proxmox
            (
                "-id 100 -name vm,,1,debug-threads=on -no-shutdown"
                " -chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off"
                " -mon chardev=qmp,mode=control"
                " -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5"
                " -mon chardev=qmp-event,mode=control"
            ),
            "vm,1",
            {("qmp", "/var/run/qemu-server/100.qmp")},
        ),
        (  # lima
            (
                "-qmp unix:/home/u/.lima/d/qmp.sock,server=on,wait=off -name lima-d"
                " -chardev socket,id=char-serial,path=/home/u/.lima/d/ser.sock,server=on,wait=off"
                " -serial chardev:char-serial"
            ),
            "lima-d",
            {
                ("qmp", "/home/u/.lima/d/qmp.sock"),
                ("other", "/home/u/.lima/d/ser.sock"),
            },
        ),
        (
            (
                "--monitor telnet:0.0.0.0:4444,server=on disk.img -serial mon:unix:s,server=on"
                " -gdb unix:/a,,b"
            ),
            "",
            {("hmp", "0.0.0.0:4444"), ("hmp", "s"), ("gdbstub", "/a,b")},
        ),
        (  # a console that is shared with a monitor; declared behind its use
            "-serial chardev:mux -mon mux -chardev socket,id=mux,host=::1,port=5,server=on,mux=on",
            "",
            {("hmp", "[::1]:5")},
        ),
    ],
)
def test_channels(text: str, name: str, expected: set[tuple[str, str | None]]):
    line = parse(text)
    assert line.name == name
    assert listening(line) == expected


def test_what_has_no_socket():
    assert parse("-nographic").channels == (Channel("hmp", "stdio"),)
    assert parse("-nographic -nodefaults").channels == ()
    assert parse("-nographic -monitor none").channels == ()
    assert parse("-monitor pty -serial stdio").channels == (
        Channel("hmp", "pty"),
        Channel("other", "stdio"),
    )
    (inherited,) = parse("-qmp unix:fd=3,server=on").channels
    assert (inherited.descriptor, inherited.path, inherited.listens) == (3, None, True)
    (client,) = parse("-qmp unix:/x").channels
    assert not client.listens


def test_what_the_guest_is():
    line = parse(
        "-M pc,accel=kvm:tcg -m size=2G,slots=4 -smp sockets=2,cores=3 -uuid u -kernel k"
        " -incoming tcp:0:4444 -pidfile /p -name guest=a,process=b -id 100"
    )
    assert (line.machine, line.accelerator, line.memory, line.vcpus) == ("pc", "kvm", 2 << 30, 6)
    assert (line.name, line.uuid, line.identifier, line.kernel) == ("a", "u", "100", "k")
    assert (line.incoming, line.pid_file) == ("tcp:0:4444", "/p")
    line = parse("-S -readconfig /run/incus/web1/qemu.conf -m 64")
    assert (line.machine, line.accelerator, line.memory, line.vcpus) == ("q35", "kvm", 64 << 20, 2)
    assert parse("-readconfig /none").configurations == ("/none",)


@pytest.mark.parametrize(
    "text",
    [
        "-m",
        "-m nonsense -smp x,cores=-1 -name ,,, -chardev socket -mon mode=control",
        "-qmp tcp::99999999,server -monitor unix: -gdb tcp: -chardev socket,fd=-3,port=x",
        "-" + " -" * 50 + " --",
        f"-m {'9' * 5000} -smp {'9' * 5000}",
    ],
)
def test_nonsense_is_passed_over(text: str):
    line = parse(text)
    assert line.memory is None
    assert all(channel.address is None or channel.port == 0 for channel in line.channels)


def test_options_and_sizes():
    assert parse_options("a,,b,c=d,,e,nowait,server", "first") == {
        "first": "a,b",
        "c": "d,e",
        "wait": "off",
        "server": "on",
    }
    assert [parse_size(text) for text in ("64", "2G", "1048576k", "3b", "x", "")] == [
        64 << 20,
        2 << 30,
        1 << 30,
        3,
        None,
        None,
    ]
