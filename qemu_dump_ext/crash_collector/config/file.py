"""Read a configuration: YAML, with the line and the column of every mistake."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from qemu_dump_ext.crash_collector.config.settings import (
    AfterCommand,
    Configuration,
    GuestEntry,
    Heartbeat,
    Limits,
    Notification,
    Rate,
    Settings,
    Symbols,
    Upload,
)
from qemu_dump_ext.errors import RequestError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_BYTES_MAX = 1 << 20
_NODES_MAX = 100_000
_DIGITS_MAX = 100
_CONFIGURATION = TypeAdapter(Configuration)


def load_configuration(path: Path) -> Configuration:
    """Read and check a configuration file.

    Raises:
        RequestError: It cannot be read, or is wrong; says where, and what would be right.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"cannot read {path}: {reason}") from error
    if len(content) > _BYTES_MAX:
        raise RequestError(f"{path}: it has more than {_BYTES_MAX} bytes")
    return parse_configuration(text, str(path))


def parse_configuration(text: str, name: str) -> Configuration:
    """Check the text of a configuration.

    Args:
        text: YAML.
        name: What messages call it.

    Raises:
        RequestError: It is wrong; says where (LINE:COLUMN, from 1), and what would be right.
    """
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _Check(name).look_at(node)
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RequestError(f"{name}{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # such as a control character
        raise RequestError(f"{name}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise RequestError(f"{name}: it is nested too deep, or in itself") from error
    except (ValueError, OverflowError) as error:  # of a number that Python does not take
        raise RequestError(f"{name}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise RequestError(f"{name}: it is no mapping of words", hint="`store: DIRECTORY` at least")
    try:
        # Mistakes in the defaults are found there, and not in each guest.
        _CONFIGURATION.validate_python(content | {"guests": ()})
        return _CONFIGURATION.validate_python(_with_defaults(content))
    except ValidationError as error:
        raise RequestError("\n".join(_mistakes(error, node, name))) from error


def _with_defaults(content: dict[Any, Any]) -> dict[Any, Any]:
    defaults, guests = content.get("defaults"), content.get("guests")
    if not isinstance(defaults, dict) or not isinstance(guests, list):
        return content
    merged = [defaults | guest if isinstance(guest, dict) else guest for guest in guests]
    return content | {"guests": merged}


def _mistakes(error: ValidationError, root: Any, name: str) -> list[str]:
    lines = []
    for found in error.errors(include_url=False):
        path = [part for part in found["loc"] if part not in {"function-after", "AfterCommand"}]
        mark, place = _locate(root, path)
        message = _in_words(found)
        lines.append(f"{name}:{mark.line + 1}:{mark.column + 1}: {place or 'here'}: {message}")
    return list(dict.fromkeys(lines))


_KNOWN_WORDS = {
    "guests": GuestEntry,
    "defaults": Settings,
    "limits": Limits,
    "upload": Upload,
    "notify": Notification,
    "heartbeat": Heartbeat,
    "rate": Rate,
    "symbols": Symbols,
    "after": AfterCommand,
}


def _in_words(found: ErrorDetails) -> str:
    """Return a mistake in the words of whoever wrote the file."""
    if found["type"] == "unexpected_keyword_argument":
        parents = [str(part) for part in found["loc"][:-1] if isinstance(part, str)]
        declared = next(
            (_KNOWN_WORDS[name] for name in reversed(parents) if name in _KNOWN_WORDS),
            Configuration,
        )
        known = [field.name for field in dataclasses.fields(declared)]
        word = str(found["loc"][-1])
        near = difflib.get_close_matches(word, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"there is no word {word} here; {hint}"
    if found["type"] == "missing":
        return "it is missing, and must be there"
    if found["type"] in {"dataclass_type", "dataclass_exact_type"}:
        return f"it must be words with values, such as {{...}}, and is {_kind_of(found['input'])}"
    if found["type"] == "tuple_type":
        return f"it must be a list, such as [...], and is {_kind_of(found['input'])}"
    if found["type"] in {"string_type", "path_type"}:
        said = f"it must be a text, and is {_kind_of(found['input'])}"
        if isinstance(found["input"], dict):
            said += ': what begins with a brace is put in quotes, as "{name}"'
        return said
    message = found["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _kind_of(value: object) -> str:
    if isinstance(value, dict):
        return "words with values"
    if isinstance(value, list):
        return "a list"
    return "empty" if value is None else f"{value!r}"[:100]


def _locate(node: Any, path: Sequence[int | str]) -> tuple[Any, str]:
    """Return the mark of the deepest node on the path, and the words that lead there."""
    mark, words = node.start_mark, []
    for part in path:
        if isinstance(part, int):
            children = node.value if node.id == "sequence" else []
            if part >= len(children):
                break
            node = children[part]
            mark = node.start_mark
        else:
            pairs = node.value if node.id == "mapping" else []
            found = [pair for pair in pairs if pair[0].value == part]
            if not found:
                if part.isidentifier() and node.id == "mapping":
                    words.append(part)
                break
            key, node = found[0]
            mark = key.start_mark if node.id != "scalar" else node.start_mark
        words.append(str(part))
    return mark, ".".join(words)


class _Check:
    # Before anything is made of it: a few lines can stand for very many, by aliases.
    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes = 0

    def look_at(self, node: Any) -> None:
        self._nodes += 1
        if self._nodes > _NODES_MAX:
            self._refuse(node, f"there are more than {_NODES_MAX} values")
        if node.id == "scalar":
            self._look_at_text(node)
        elif node.id == "sequence":
            for child in node.value:
                self.look_at(child)
        else:
            self._look_at_pairs(node)

    def _look_at_pairs(self, node: Any) -> None:
        seen = set()
        for key, child in node.value:
            if key.id != "scalar":
                self._refuse(key, "a word is no list and no mapping")
            if key.value in seen:
                self._refuse(key, f"{key.value} is there twice")
            seen.add(key.value)
            self.look_at(child)

    def _look_at_text(self, node: Any) -> None:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            self._refuse(node, "it has half a character")
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _DIGITS_MAX:
            self._refuse(node, f"a number has at most {_DIGITS_MAX} digits")

    def _refuse(self, node: Any, message: str) -> NoReturn:
        mark = node.start_mark
        raise RequestError(f"{self._name}:{mark.line + 1}:{mark.column + 1}: {message}")
