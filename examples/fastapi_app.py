"""A FastAPI app over tierkv's engine: /stories streams a text, and a client that goes away ends its request.

pip install 'tierkv[hf]' fastapi uvicorn
uvicorn --app-dir examples fastapi_app:app
curl -N 'localhost:8000/stories?about=disks'

TIERKV_MODEL names the model (the embedded one by default), TIERKV_STORE the directory of the store.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import StreamingResponse

from tierkv import (
    CacheConfig,
    CapacityError,
    Engine,
    GenerationOptions,
    QueueFullError,
    TokenStream,
    load_model,
    open_runner,
)

SYSTEM = "You are a storyteller. You write short stories for people that build computers. " * 10
HOME = Path("~/.cache/tierkv").expanduser()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model and open its cache before the first request; close both after the last one."""
    loaded = load_model(os.environ.get("TIERKV_MODEL"), cache_dir=HOME)
    config = CacheConfig(cold_path=Path(os.environ.get("TIERKV_STORE") or HOME / "store"), warm_bytes=256 << 20)
    with open_runner(loaded, config) as runner:
        app.state.tokenizer = loaded.tokenizer
        app.state.system = loaded.tokenizer.encode(SYSTEM)
        runner.prefill(app.state.system)  # computed once in the life of the store
        with Engine(runner, max_waiting=256) as app.state.engine:
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/stories")
async def stories(
    request: Request,
    about: Annotated[str, Query(max_length=1000)],
    tokens: Annotated[int, Query(ge=1, le=2000)] = 100,
) -> StreamingResponse:
    """Stream a story."""
    state = request.app.state
    prompt = state.system + state.tokenizer.encode(f"A story about {about}:", add_special_tokens=False)
    try:
        stream = state.engine.submit(prompt, GenerationOptions(max_new_tokens=tokens, store_partial=True))
    except QueueFullError as exc:
        raise HTTPException(429, str(exc), headers={"Retry-After": "1"}) from exc
    except CapacityError as exc:
        raise HTTPException(413, str(exc)) from exc
    return StreamingResponse(_words(stream, state.tokenizer), media_type="text/plain; charset=utf-8")


@app.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Return how many stories are computed, how many wait, and how many clients have gone."""
    stats = request.app.state.engine.stats()
    return {"running": stats.running, "waiting": stats.waiting, "cancelled": stats.cancelled}


async def _words(stream: TokenStream, tokenizer: object) -> AsyncIterator[str]:
    """Yield text as it comes. If the client goes away, the server ends this generator, and the block cancels."""
    with stream:
        token_ids: list[int] = []
        sent = ""
        async for event in stream:
            token_ids.append(event.token_id)
            text = tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[attr-defined]
            if not text.endswith("\ufffd"):  # the first bytes of a character
                yield text[len(sent) :]
                sent = text
        yield tokenizer.decode(token_ids, skip_special_tokens=True)[len(sent) :]  # type: ignore[attr-defined]
