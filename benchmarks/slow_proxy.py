"""SlowProxy: a network between two machines, where the kernel has no netem.

    python -m benchmarks.slow_proxy PORT SECONDS BYTES_PER_S HOST OWN_PORT

forwards to a port of this machine, and prints its own port. OWN_PORT 0: the system chooses one.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

__all__ = ["SlowProxy"]


class SlowProxy:
    """Forwards bytes to a port, each way later by `delay_s`, and no faster than `bytes_per_s`. May drop all of them."""

    def __init__(
        self,
        target: int,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._target = target
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.drops = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((host, port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        """Read all the time, and send each piece when its time has come."""
        pieces: list[tuple[float, bytes]] = []
        changed = threading.Condition()

        def send() -> None:
            free_at = 0.0
            with contextlib.suppress(OSError):
                while True:
                    with changed:
                        changed.wait_for(lambda: bool(pieces))
                        at, data = pieces.pop(0)
                    time.sleep(max(0.0, at - time.monotonic(), free_at - time.monotonic()))
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    if not self.drops:
                        target.sendall(data)
                    if self.bytes_per_s:
                        free_at = max(free_at, time.monotonic()) + len(data) / self.bytes_per_s

        threading.Thread(target=send, daemon=True).start()
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(1 << 16)
                with changed:
                    pieces.append((time.monotonic() + self.delay_s, data))
                    changed.notify()
                if not data:
                    return


def main() -> None:
    """Forward until the process is killed."""
    target, delay_s, bytes_per_s, host, port = sys.argv[1:]
    proxy = SlowProxy(int(target), delay_s=float(delay_s), bytes_per_s=float(bytes_per_s), host=host, port=int(port))
    print(proxy.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
