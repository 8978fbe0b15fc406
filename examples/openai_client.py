"""Two turns of a chat with `tierkv serve`, by the official client. pip install openai; OPENAI_BASE_URL says where."""

from __future__ import annotations

import os
from typing import Any

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages: list[Any] = [{"role": "system", "content": "You answer questions about our billing system. " * 40}]

for question in ("Why was I charged twice?", "And how do I get it back?"):
    messages.append({"role": "user", "content": question})
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer = ""
    for chunk in stream:
        if chunk.choices:
            answer += chunk.choices[0].delta.content or ""
        elif (usage := chunk.usage) and (details := usage.prompt_tokens_details):
            print(f"{usage.prompt_tokens} tokens, of which {details.cached_tokens} were cached")
    messages.append({"role": "assistant", "content": answer})
