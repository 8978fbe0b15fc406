"""A user of a container: runs commands of tierkv one after the other, and prints what each of them said as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_S = 300
TIERKV = [sys.executable, "-m", "tierkv"]
CHAT = {"model": "embedded", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def tierkv(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([*TIERKV, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def chat(*arguments: object) -> dict[str, Any]:
    """Start a server, ask it once, and end it."""
    process = subprocess.Popen([*TIERKV, "serve", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[-1]
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(CHAT).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
    return {"code": process.wait(TIMEOUT_S), "out": text, "err": ""}


def main() -> None:
    small = ("--block-size", 16, "--hot", "64M")
    Path("prompts.txt").write_text(f"{'You are a careful assistant. ' * 12}\n---\n{'You answer in verse. ' * 12}\n")
    ask = ("run", "Hello", "--system", "prompts.txt", *small, "--max-new-tokens", 2, "--json")
    warm = ("warm", "prompts.txt", *small, "--warm", "16M", "--json")
    results = {"environment": {"names": sorted(os.environ), "uid": os.geteuid()}}
    for name, act, arguments in (
        ("warm", tierkv, warm),
        ("warm again", tierkv, warm),
        ("run", tierkv, (*ask, "--warm", "16M")),
        ("explain", tierkv, ("explain", "Help", "--system", "prompts.txt", "--block-size", 16, "--json")),
        ("stats", tierkv, ("stats", "--json")),
        ("inspect", tierkv, ("inspect", "--json")),
        ("limit", tierkv, ("tenant", "set", "research", "--salt", "s3cret", "--cold-limit", "20M")),
        ("save", tierkv, ("save", "--all", "backup.tkv")),
        ("load", tierkv, ("load", "backup.tkv", "--store", "restored", "--json")),
        ("evict", tierkv, ("evict", "--to", 0, "--dry-run", "--json")),
        ("serve", chat, (*small, "--warm", "16M", "--port", 0)),
        ("start", tierkv, ("daemon", "start", "--detach", "--warm", "16M", "--socket", "d.sock")),
        ("run by daemon", tierkv, (*ask, "--socket", "d.sock")),
        ("status", tierkv, ("daemon", "status", "--socket", "d.sock", "--json")),
        ("stop", tierkv, ("daemon", "stop", "--socket", "d.sock")),
        ("move", tierkv, ("move", "moved")),
    ):
        started = time.monotonic()
        results[name] = act(*arguments) | {"seconds": round(time.monotonic() - started, 2)}
    results["files"] = {"left": sorted(str(each) for each in Path().iterdir())}
    print(json.dumps(results))


main()
