from __future__ import annotations

import pytest

from qemu_dump_ext.qemu.control_group import belongings

_ID = "0123456789abcdef" * 4
_POD = "12345678-90ab-cdef-1234-567890abcdef"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            r"/machine.slice/machine-qemu\x2d3\x2dweb\x2d1.scope/emulator",
            [("libvirt domain", "web-1")],
        ),
        ("/machine/qemu-7-web1.libvirt-qemu", [("libvirt domain", "web1")]),
        (f"/system.slice/docker-{_ID}.scope", [("Docker container", "0123456789ab")]),
        (f"/docker/{_ID}", [("container", "0123456789ab")]),
        (f"/machine.slice/libpod-{_ID}.scope/container", [("Podman container", "0123456789ab")]),
        (
            (
                f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"
                f"{_POD.replace('-', '_')}.slice/cri-containerd-{_ID}.scope"
            ),
            [("Kubernetes pod", _POD), ("container", "0123456789ab")],
        ),
        (
            f"/kubepods/besteffort/pod{_POD}/{_ID}",
            [("Kubernetes pod", _POD), ("container", "0123456789ab")],
        ),
        ("/lxc.payload.c1", [("LXC container", "c1")]),
        ("/qemu.slice/100.scope", [("Proxmox guest", "100")]),
        (r"/system.slice/vm\x2dweb.service", [("systemd unit", "vm-web.service")]),
        ("/user.slice/user-0.slice/session-1.scope", []),
        ("/", []),
    ],
)
def test_belongings(path: str, expected: list[tuple[str, str]]):
    assert list(belongings(f"0::{path}\n")) == expected


def test_every_hierarchy_counts_once():
    text = "4:memory:/docker/x\n3:cpu:/lxc.payload.c1\n0::/lxc.payload.c1\n\nnonsense"
    assert list(belongings(text)) == [("LXC container", "c1")]
