"""One client of the proxied human monitor, on a socket."""

from __future__ import annotations

from qemu_dump_ext.printable import printable

from ..readline import PROMPT, LineEditor
from ..sockets.connection import Connection
from .interpreter import HmpClient, Interpreter

GONE_PROMPT = b"(qemu gone) "
_OUTPUT_STEP = 1 << 16
_TOLD_MAX = 1 << 16
_GOODBYE_SECONDS = 5.0


class HmpSession:
    """Serves one client as QEMU's monitor would."""

    def __init__(
        self, connection: Connection, interpreter: Interpreter, *, at_terminal: bool = False
    ) -> None:
        """Serve a client.

        Args:
            connection: The connection to the client.
            interpreter: The interpreter of its lines.
            at_terminal: It shows what it gets, and must not obey what guests have chosen.
        """
        self._connection = connection
        self._at_terminal = at_terminal
        self._interpreter = interpreter
        upstream = interpreter.upstream
        self._editor = LineEditor(
            upstream.version,
            lambda text: interpreter.table.complete(text, upstream.qemu_directory()),
        )
        self._client = HmpClient(
            history=lambda: self._editor.history,
            gone=connection.gone.wait,
            told=self.tell,
        )
        self._busy = False
        self._untold = b""

    async def serve(self) -> None:
        """Serve until the client leaves."""
        version = self._interpreter.upstream.version_text
        self._connection.write(
            f"QEMU {version} monitor - type 'help' for more information\r\n".encode()
        )
        self._set_prompt()
        self._show_prompt()
        while data := await self._connection.read():
            for key in data:
                await self._feed(key)
                if self._connection.gone.is_set():
                    return
            self._connection.write(self._editor.take_output())
            await self._connection.drain()
        await self._connection.finish(_GOODBYE_SECONDS)

    def tell(self, text: bytes) -> None:
        """Show `text`, above the line that the client is typing or behind the running command."""
        text = self._shown(text)
        if self._busy:
            self._untold = (self._untold + text)[-_TOLD_MAX:]
        elif self._connection.waiting < _TOLD_MAX:
            self._editor.show_again(text)
            self._connection.write(self._editor.take_output())

    def state_changed(self) -> None:
        """Say that QEMU is gone, or back."""
        upstream = self._interpreter.upstream
        self._set_prompt()
        if upstream.connected:
            self.tell(f"QEMU {upstream.version_text} is back\r\n".encode())
        elif not self._client.quit:
            self.tell(b"QEMU is gone; waiting for it\r\n")

    def _shown(self, text: bytes) -> bytes:
        if not self._at_terminal:
            return text
        return printable(text.decode("utf-8", "replace"), keep="\r\n\t").encode()

    def _set_prompt(self) -> None:
        upstream = self._interpreter.upstream
        self._editor.prompt = PROMPT if upstream.connected else GONE_PROMPT
        self._editor.set_version(upstream.version)

    def _show_prompt(self) -> None:
        self._editor.show_prompt()
        self._connection.write(self._editor.take_output())

    async def _feed(self, key: int) -> None:
        line = self._editor.feed(key)
        if line is not None:
            self._connection.write(self._editor.take_output())
            self._busy = True
            try:
                answer = await self._interpreter.run(line.decode("utf-8", "replace"), self._client)
            finally:
                self._busy = False
            if self._client.quit and not self._interpreter.upstream.connected:
                await self._connection.finish(_GOODBYE_SECONDS)
                return
            self._connection.write(self._shown(answer.encode("utf-8", "replace")) + self._untold)
            self._untold = b""
            self._show_prompt()
            await self._connection.drain()
        elif self._editor.pending > _OUTPUT_STEP:
            self._connection.write(self._editor.take_output())
            await self._connection.drain()
