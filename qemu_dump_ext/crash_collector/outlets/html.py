"""HTML as a tree of elements, in which text stays text, and what is not printable its number."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.resources import files
from typing import TypeAlias
from urllib.parse import quote
from xml.etree.ElementTree import Element, tostring

from qemu_dump_ext.printable import printable

HEAD = "<!DOCTYPE html>\n<!-- report of qemu-crash-collector -->\n"
_TEXT_MAX = 500

Content: TypeAlias = str | Element | None


def element(tag: str, *contents: Content, **attributes: str) -> Element:
    """Return an element.

    Args:
        tag: Its name.
        contents: Texts, of which each shows its first 500 characters, and elements; None: nothing.
        attributes: `class_`, `http_equiv` and `data_x` as Python has to write them.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(
        tag, {names[name]: printable(text, keep="") for name, text in attributes.items()}
    )
    for content in contents:
        if isinstance(content, Element):
            made.append(content)
        elif content is not None:
            text = content if len(content) <= _TEXT_MAX else f"{content[:_TEXT_MAX]}…"
            _add_text(made, printable(text, keep=""))
    return made


def preformatted(text: str, **attributes: str) -> Element:
    """Return lines as they are, however many."""
    made = element("pre", **attributes)
    made.text = printable(text, keep="\n\t")
    return made


def _add_text(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text


def document(title: str, body: Element, *, feed: str | None = None) -> str:
    """Return a page: it loads nothing, and runs nothing but our own script.

    Should text become markup after all, the policy, which names the hashes of style and script,
    keeps it from doing anything.

    Args:
        title: Of the page.
        body: The element `body`.
        feed: Address of its Atom feed, or None.
    """
    style, script = Element("style"), Element("script")
    style.text, script.text = _resource("report.css"), _resource("report.js")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none';"
        f" style-src {_hash_of(style.text)}; script-src {_hash_of(script.text)}"
    )
    links = []
    if feed is not None:
        links = [element("link", rel="alternate", type="application/atom+xml", href=feed)]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        *links,
        style,
    )
    body.append(script)
    return HEAD + tostring(element("html", head, body, lang="en"), "unicode", "html") + "\n"


def _resource(name: str) -> str:
    return "\n" + files(__package__).joinpath(name).read_text("utf-8")


def _hash_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def table(heads: Sequence[str], rows: Iterable[Element], **attributes: str) -> Element:
    """Return a table, whose cells say what they are where there is no room for a header."""
    head = element("thead", element("tr", *(element("th", text) for text in heads)))
    body = element("tbody")
    for row in rows:
        for text, cell in zip(heads, row, strict=True):
            cell.set("data-label", text)
        body.append(row)
    return element("table", head, body, **attributes)


def link(target: str, text: str, **attributes: str) -> Element:
    """Return a link."""
    return element("a", text, href=target, **attributes)


def quoted(path: str) -> str:
    """Return a path as it stands in a link; of a file system that need not know UTF-8."""
    return quote(path.encode("utf-8", "surrogateescape"))


def time_element(text: str) -> Element:
    """Return a moment, as records have it, to the second."""
    return element("time", text[:19].replace("T", " "), datetime=text)


def sort_key(text: str) -> str:
    """Return a moment as a number that is sorted by."""
    return f"{datetime.fromisoformat(text).timestamp():.6f}"


def joined(contents: Iterable[Content]) -> Sequence[Content]:
    """Return these below each other."""
    return [part for content in contents for part in (content, element("br"))][:-1]


def copied(command: str) -> Element:
    """Return a command with a button that copies it."""
    return element(
        "div",
        element("code", command),
        element("button", "copy", type="button", class_="copy", hidden="hidden"),
        class_="command",
    )
