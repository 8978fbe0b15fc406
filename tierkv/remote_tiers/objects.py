"""ObjectsClient: records as objects in S3, Google Cloud Storage or Azure, through obstore (the extra `objects`).

Every call runs on a thread of its own: obstore has no deadline for each call. Its retries are off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tierkv.errors import ConfigError, RemoteError, RemoteRefusedError
from tierkv.remote_tiers.call_threads import CallThreads
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError, RemoteKey, namespace_folder
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.block import BlockHash

__all__ = ["ObjectsClient"]

Result = TypeVar("Result")

_MOST_THREADS = 32
_AT_ONCE = 7  # questions that divide what is not known yet into eight parts
_PART_BYTES = 16 << 20  # of a record that is read by several requests at once
_LATE_S = 60  # a call that nothing waits for any more ends after that


class ObjectsClient:
    """Satisfies `RemoteClient`. The path of the URL is a folder in the bucket.

    Credentials come from the provider's own variables, files and roles. Raises ConfigError where obstore is not
    installed, or refuses the URL.
    """

    def __init__(self, url: RemoteUrl) -> None:
        self._obstore = _import_obstore()
        self._errors: Any = self._obstore.exceptions
        self._store = self._open(url)
        self._folder = f"{url.path}/" if url.path else ""
        self._memory = RecordMemory()
        self._threads = CallThreads(_MOST_THREADS, name="tierkv-remote-objects")

    def ping(self, deadline: Deadline) -> None:
        """Ask for an object that does not exist."""
        self.prefix([RemoteKey(bytes(16), bytes(16))], deadline)

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Find the last object by bisection, several questions at a time: parents are written first."""
        paths = [self._path(key) for key in keys]
        return self._call(lambda: asyncio.run(self._num_present(paths)), deadline) if paths else 0

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Read an object, a long one by several requests at once."""
        path = self._path(key)
        first = self._call(lambda: self._first_part(path, most_bytes), deadline)
        if first is None:
            return None
        size, head = first
        deadline.allow_bytes(size)
        if len(head) == size:
            return head
        return self._call(lambda: asyncio.run(self._other_parts(path, size, head)), deadline)

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        """Put an object, with If-None-Match unless `replace`."""
        path = self._path(key)
        mode = "overwrite" if replace else "create"

        def put() -> bool:
            try:
                self._obstore.put(self._store, path, record.data, mode=mode, use_multipart=False)
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                return False
            return True

        return self._call(put, deadline)

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Do nothing: objects have no time of their last use. A rule of the bucket may remove old ones."""

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Put namespace.json beside the namespace's records."""
        path = f"{self._folder}{namespace_folder(namespace)}/namespace.json"

        def put() -> None:
            try:
                self._obstore.put(self._store, path, description, mode="create", use_multipart=False)
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                return

        self._call(put, deadline)

    def close(self) -> None:
        """Let all threads end."""
        self._threads.close()

    def _open(self, url: RemoteUrl) -> Any:
        stores: Any = self._obstore.store
        timeout = f"{_LATE_S}s"
        options: dict[str, Any] = {
            "client_options": {"timeout": timeout, "connect_timeout": f"{max(1, int(url.call_time().base_s))}s"},
            "retry_config": {"max_retries": 0},
        }
        if url.flag("allow_http"):
            options["client_options"]["allow_http"] = True
        endpoint, bucket = url.option("endpoint"), url.hosts[0][0]
        if endpoint:
            options["endpoint"] = endpoint
        try:
            if url.scheme == "s3":
                if region := url.option("region"):
                    options["region"] = region
                return stores.S3Store(bucket, **options)
            if url.scheme == "gs":
                return stores.GCSStore(bucket, **options)
            if account := url.option("account"):
                options["account_name"] = account
            return stores.AzureStore(bucket, **options)
        except (self._errors.BaseError, ValueError, TypeError) as exc:
            raise ConfigError(f"the remote tier {url} cannot be opened: {type(exc).__name__}") from None

    def _path(self, key: RemoteKey) -> str:
        return self._folder + key.path()

    async def _num_present(self, paths: Sequence[str]) -> int:
        low, high = 0, len(paths)  # the first `low` are there, those from `high` on are not
        while low < high:
            step = max(1, (high - low) // (_AT_ONCE + 1))
            asked = sorted({*range(low + step - 1, high, step)[:_AT_ONCE], high - 1})
            there = await asyncio.gather(*(self._exists(paths[at]) for at in asked))
            missing = next((at for at, exists in zip(asked, there, strict=True) if not exists), high)
            low = max([low, *(at + 1 for at in asked if at < missing)])
            high = missing
        return low

    async def _exists(self, path: str) -> bool:
        try:
            await self._obstore.head_async(self._store, path)
        except (self._errors.NotFoundError, FileNotFoundError):
            return False
        return True

    def _first_part(self, path: str, most_bytes: int) -> tuple[int, Bytes] | None:
        """Return an object's size and its first bytes; None where there is none."""
        try:
            found = self._obstore.get(self._store, path, options={"range": (0, _PART_BYTES)})
        except (self._errors.NotFoundError, FileNotFoundError):
            return None
        size = int(found.meta["size"])
        if not 0 < size <= most_bytes:
            raise RemoteDamageError(f"an object of {size} bytes is no record of this layout")
        wanted = min(size, _PART_BYTES)
        memory = self._memory.take(wanted)
        end = 0
        for part in found.stream(min_chunk_size=1):
            piece = np.frombuffer(part, dtype=np.uint8)
            if end + piece.size > wanted:
                raise RemoteDamageError("the object store sends more than it has announced")
            memory[end : end + piece.size] = piece
            end += piece.size
        if end < wanted:
            raise RemoteError("the object store has closed the connection within an object")
        return size, memory

    async def _other_parts(self, path: str, size: int, head: Bytes) -> Bytes:
        memory = self._memory.take(size)
        memory[: head.size] = head

        async def read(start: int) -> None:
            end = min(start + _PART_BYTES, size)
            part = await self._obstore.get_range_async(self._store, path, start=start, end=end)
            piece = np.frombuffer(part, dtype=np.uint8)
            if piece.size != end - start:
                raise RemoteDamageError("the object store sends another length than it has announced")
            memory[start:end] = piece

        await asyncio.gather(*(read(start) for start in range(head.size, size, _PART_BYTES)))
        return memory

    def _call(self, work: Callable[[], Result], deadline: Deadline) -> Result:
        """Run requests on a thread, for as long as the deadline allows."""
        errors = self._errors
        try:
            return self._threads.call(work, timeout_s=deadline.left_s())
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as exc:
            raise RemoteRefusedError("the object store does not allow that", code=type(exc).__name__[:-5]) from None
        except (errors.BaseError, OSError, ValueError) as exc:  # the text may name keys of the account
            raise RemoteError(f"the object store does not answer: {type(exc).__name__}") from None


def _import_obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as exc:
        raise ConfigError("a remote tier of objects needs obstore", hint="pip install 'tierkv[objects]'") from exc
    return obstore
