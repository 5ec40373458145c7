"""The QMP door: QMP for any number of clients, of whom each thinks that QEMU is its own."""

from __future__ import annotations

from ..human.interpreter import Interpreter
from ..sockets.connection import Connection
from ..upstream.by_qmp import QmpUpstream
from ..upstream.upstream import Event
from .descriptors import NamedDescriptors
from .session import QmpSession


class QmpDoor:
    """What all clients of QMP share."""

    def __init__(self, upstream: QmpUpstream, interpreter: Interpreter) -> None:
        self._upstream = upstream
        self._interpreter = interpreter
        self._descriptors = NamedDescriptors()
        self._sessions: set[QmpSession] = set()
        interpreter.dumps.on_event = self._publish

    async def serve(self, connection: Connection) -> None:
        """Serve one client."""
        session = QmpSession(connection, self._upstream, self._interpreter, self._descriptors)
        self._sessions.add(session)
        try:
            await session.serve()
        finally:
            self._sessions.discard(session)

    def state_changed(self) -> None:
        """QEMU's clients lose their connection when QEMU ends, and ours do too."""
        if not self._upstream.connected:
            for session in list(self._sessions):
                session.end()
            self._descriptors.drop_all()

    def _publish(self, event: Event) -> None:
        for session in list(self._sessions):
            session.send_event(event)
