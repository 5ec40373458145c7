from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest_images.manifest import find_image, load_manifest, parse_manifest

_ENTRY: dict[str, Any] = {
    "target": "x86_64",
    "description": "a guest",
    "qemu": "qemu-system-x86_64",
    "machine": ["-M", "q35"],
    "memory_mib": 256,
    "cpus": 2,
    "packages": {"debian": {"architecture": "amd64", "kernel": "linux-image-amd64"}},
    "kernel_arguments": "quiet",
    "devices": ["vmcoreinfo"],
    "modules": [],
    "fill_modules": [],
    "marker": "ready",
    "failure_pattern": "Kernel panic",
    "timeout_seconds": 60,
    "kernel_log": "end",
    "processes": ["worker"],
}


def _parse(entry: dict[str, Any]):
    return parse_manifest(yaml.safe_dump({"guests": {"test": entry}}), "images.yaml")["test"]


def test_the_shipped_manifest_is_valid():
    images = load_manifest()
    assert images["x86_64"].packages["debian"].kernel == "linux-image-cloud-amd64"
    assert all(name == image.name for name, image in images.items())


def test_optional_keys_may_be_absent():
    spec = _parse(_ENTRY).packages["debian"]
    assert (spec.suite, spec.debug_symbols) == (None, None)


@pytest.mark.parametrize("key", sorted(_ENTRY))
def test_a_missing_key_is_named(key: str):
    entry = copy.deepcopy(_ENTRY)
    del entry[key]
    with pytest.raises(RequestError, match=f"test lacks '{key}'"):
        _parse(entry)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cpus", "two", "'cpus' must be a number, not 'two'"),
        ("cpus", True, "'cpus' must be a number, not True"),
        ("memory_mib", 0, "'memory_mib' must be at least 1, not 0"),
        ("machine", "-M q35", "'machine' must be a list of texts"),
        ("modules", [1], "'modules' must be a list of texts"),
        ("failure_pattern", "(", "'failure_pattern' is no pattern"),
        ("marker", "a\nb", "'marker' must be one line of text"),
        ("packages", [], "'packages' must be a mapping"),
        ("packages", {"debian": "amd64"}, "test: debian must be a mapping"),
        ("memory", 1, "unknown keys: memory"),
    ],
)
def test_a_wrong_value_is_refused(key: str, value: object, message: str):
    with pytest.raises(RequestError, match=message):
        _parse({**_ENTRY, key: value})


@pytest.mark.parametrize("text", ["guests: [", "", "- a", "other: {}", "guests: {}\nmore: 1"])
def test_what_is_no_manifest_is_refused_in_one_line(text: str):
    with pytest.raises(RequestError) as caught:
        parse_manifest(text, "images.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("images.yaml")


def test_an_unknown_guest_is_answered_with_those_there_are():
    with pytest.raises(RequestError, match=r"no guest image 'vax' \(there are: .*x86_64"):
        find_image("vax")
