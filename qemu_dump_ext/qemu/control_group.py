"""To what a process belongs, by its control group: a domain, a container, a pod, a unit.

Source: cgroups(7); systemd.unit(5) on escaping; the names that libvirt, Docker, Podman, containerd,
CRI-O, Kubernetes, LXC and Proxmox give to control groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_CONTAINER_DIGITS = 12


class Belonging(NamedTuple):
    """What a process belongs to.

    Attributes:
        kind: `libvirt domain`, `Kubernetes pod`, `Docker container`, `systemd unit`, ...
        name: Its name there.
    """

    kind: str
    name: str


def _plain(name: str) -> str:
    return name


def _short(name: str) -> str:
    return name[:_CONTAINER_DIGITS]


def _pod(name: str) -> str:
    return name.replace("_", "-")


def _unescaped(name: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)


_PATTERNS: Sequence[tuple[str, re.Pattern[str], Callable[[str], str]]] = (
    ("libvirt domain", re.compile(r"machine-(?:qemu|lxc)\\x2d\d+\\x2d(.+)\.scope"), _unescaped),
    ("libvirt domain", re.compile(r"qemu-\d+-(.+)\.libvirt-qemu"), _plain),
    (
        "Kubernetes pod",
        re.compile(r"(?:kubepods.*-)?pod([0-9a-f]{8}[0-9a-f_-]+)(?:\.slice)?"),
        _pod,
    ),
    ("Docker container", re.compile(r"docker-([0-9a-f]{64})\.scope"), _short),
    ("Podman container", re.compile(r"libpod-([0-9a-f]{64})(?:\.scope)?"), _short),
    ("container", re.compile(r"(?:crio|cri-containerd)-([0-9a-f]{64})\.scope"), _short),
    ("container", re.compile(r"([0-9a-f]{64})"), _short),
    ("LXC container", re.compile(r"lxc\.payload\.(.+)"), _plain),
    ("Proxmox guest", re.compile(r"(\d{3,9})\.scope"), _plain),
    ("systemd unit", re.compile(r"(.+\.service)"), _unescaped),
)


def belongings(text: str) -> tuple[Belonging, ...]:
    """Return what a process belongs to, the outermost first.

    Args:
        text: Of `/proc/PID/cgroup`.
    """
    found: dict[Belonging, None] = {}
    for line in text.splitlines():
        for part in line.split(":", 2)[-1].split("/"):
            for kind, pattern, name_of in _PATTERNS:
                if match := pattern.fullmatch(part):
                    found[Belonging(kind, name_of(match[1]))] = None
                    break
    return tuple(found)
