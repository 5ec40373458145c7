"""What a client of QMP must say before anything else. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .messages import Message, name_of, refusal

OUT_OF_BAND = "oob"
_NEGOTIATE = "qmp_capabilities"


class Negotiation:
    """What one client has negotiated.

    Attributes:
        done: The client may execute commands.
        out_of_band: It may execute some of them while others are under way.
    """

    def __init__(self) -> None:
        self.done = False
        self.out_of_band = False

    def concerns(self, request: Message) -> bool:
        """Tell whether a request is for `answer`, and for nobody else."""
        return not self.done or name_of(request) == _NEGOTIATE

    def answer(self, request: Message, offered: Sequence[str]) -> Message:
        """Return the answer of a request that concerns the negotiation.

        Args:
            request: The request of the client.
            offered: The capabilities in QEMU's greeting.
        """
        if "execute" not in request:
            return refusal("QMP input lacks member 'execute'")
        if name_of(request) != _NEGOTIATE:
            text = f"Expecting capabilities negotiation with '{_NEGOTIATE}'"
            return refusal(text, "CommandNotFound")
        if self.done:
            text = "Capabilities negotiation is already complete, command ignored"
            return refusal(text, "CommandNotFound")
        wanted = _wanted_by(request)
        for capability in wanted:
            if capability not in offered:
                return refusal(_why_not(capability))
        self.out_of_band = OUT_OF_BAND in wanted
        self.done = True
        return {"return": {}}


def _wanted_by(request: Message) -> list[Any]:
    arguments = request.get("arguments")
    wanted = arguments.get("enable") if isinstance(arguments, dict) else None
    return wanted if isinstance(wanted, list) else []


def _why_not(capability: object) -> str:
    if capability == OUT_OF_BAND:
        return f"Capability {OUT_OF_BAND} not available"
    return f"Parameter 'enable' does not accept value '{capability}'"
