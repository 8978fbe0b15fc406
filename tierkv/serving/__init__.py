"""The OpenAI-compatible server over an engine. Needs starlette and uvicorn, of the extra `serve`."""
