"""Clients that the tests kill or stop: run as `python client_worker.py ACTION SOCKET`; torch-free, over the protocol.

Each prints a line when it is where the test wants it, then sleeps for ever.
"""

from __future__ import annotations

import os
import sys
import time
from array import array
from pathlib import Path

import numpy as np
from raw_client import chain_of, connect, tokens_of, write_prompt

from tierkv.daemon.messages import Chain, Found, Match, Reserve, Reserved


def main(action: str, socket: Path) -> None:
    client = connect(socket)
    tokens = np.arange(16, dtype="<u4").tobytes()
    hashes = chain_of(tokens)
    if action == "read":
        write_prompt(client, tokens)
        found = client.call(Match(hashes=hashes, tokens=tokens, lease=True), Found)
        assert len(found.slots) == 4 * 4
    elif action == "write":
        chain = Chain(hashes, tokens, array("I", range(4)).tobytes())
        given = client.call(Reserve(chains=[chain]), Reserved)
        assert len(given.chains[0].slots) == 4 * 4
    elif action == "compute":
        found = client.call(Match(hashes=hashes, tokens=tokens, lease=True, wants_claim=True), Found)
        assert found.claim
    elif action == "fork":
        write_prompt(client, tokens)
        assert client.call(Match(hashes=hashes, tokens=tokens, lease=True), Found).slots
        more = tokens_of(16, start=100)
        chain = Chain(chain_of(more), more, array("I", range(4)).tobytes())
        assert client.call(Reserve(chains=[chain]), Reserved).chains[0].slots
        other = tokens_of(16, start=200)
        assert client.call(Match(hashes=chain_of(other), tokens=other, wants_claim=True), Found).claim
        kept = client._socket.dup()  # as a program would that keeps descriptors over a fork: the client closes its own
        if not os.fork():
            kept.settimeout(10)
            print("closed" if kept.recv(1) == b"" else "open", flush=True)
            os._exit(0)
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
