"""The members of QMP's messages, each read and written in one way. Pure."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


class LeftToQemuError(Exception):
    """No failure: QEMU is to answer a request, for it does what is asked, or has words for it."""


def name_of(request: Message, member: str = "execute") -> str:
    """Return the command that a request names, or "" where it names none."""
    name = request.get(member)
    return name if isinstance(name, str) else ""


def arguments_of(request: Message) -> dict[str, Any]:
    """Return the arguments of a request.

    Raises:
        LeftToQemuError: They are no object.
    """
    arguments = request.get("arguments", {})
    if not isinstance(arguments, dict):
        raise LeftToQemuError
    return arguments


def fdname_of(request: Message) -> str:
    """Return the name of a descriptor that a request is about, or ""."""
    arguments = request.get("arguments")
    return str(arguments.get("fdname", "")) if isinstance(arguments, dict) else ""


def refusal(text: str, error_class: str = "GenericError") -> Message:
    """Return the answer that refuses a request."""
    return {"error": {"class": error_class, "desc": text}}


def with_id(answer: Message, request: object) -> Message:
    """Return an answer with the id of its request, in QEMU's order of members."""
    if not isinstance(request, dict) or "id" not in request:
        return answer
    if "error" in answer:
        return {"id": request["id"], **answer}
    return {**answer, "id": request["id"]}
