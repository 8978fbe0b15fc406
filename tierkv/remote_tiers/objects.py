"""ObjectsClient: records as objects in S3, Google Cloud Storage or Azure, through obstore (the extra `objects`).

Every call runs on a thread of its own: obstore has no deadline for each call. Its retries are off.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from tierkv.errors import ConfigError, RemoteError, RemoteRefusedError
from tierkv.remote_tiers.call_threads import CallThreads
from tierkv.remote_tiers.protocol import (
    DESCRIPTION_FILE,
    FORMAT_FOLDER,
    MOST_NAMESPACES,
    Deadline,
    RemoteDamageError,
    RemoteKey,
    namespace_folder,
)
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.remote_tiers.signed_objects import SignedObjects
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.block import BlockHash
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = ["ObjectTransfer", "ObjectsClient", "ObstoreTransfer"]

Result = TypeVar("Result")

_MOST_THREADS = 32
_AT_ONCE = 7  # questions that divide what is not known yet into eight parts
_PART_BYTES = 16 << 20  # of a record that is read by several requests at once
_LATE_S = 60  # a call that nothing waits for any more ends after that


class ObjectTransfer(Protocol):
    """Gets and puts objects by their whole paths. Thread-safe. Raises RemoteError, or what obstore raises."""

    def get(
        self, path: str, *, start: int, num_bytes: int, most_bytes: int, deadline: Deadline
    ) -> tuple[int, Bytes] | None:
        """Return an object's size and its bytes from `start` on, `num_bytes` or what there is; None where it is absent.

        Takes no memory before the size was compared with `most_bytes`. Where `start` is 0, the deadline allows for the
        bytes of the whole object from then on. Raises RemoteDamageError.
        """

    def put(self, path: str, record: Bytes, *, replace: bool, deadline: Deadline) -> bool:
        """Create an object. Return False where there is one, and change nothing then, unless `replace`."""

    def close(self) -> None:
        """Close all connections. May be called twice."""


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
        is_s3 = url.scheme == "s3"  # obstore signs for the others only with some kinds of credentials
        transfer = SignedObjects if is_s3 else ObstoreTransfer
        self._transfer: ObjectTransfer = transfer(self._obstore, self._store)
        self._memory = RecordMemory()
        self._threads = CallThreads(_MOST_THREADS, name="tierkv-remote-objects")

    def ping(self, deadline: Deadline) -> None:
        """Ask for an object that does not exist."""
        self.prefix([RemoteKey(bytes(16), bytes(16))], deadline)

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Find the last object by bisection, several questions at a time: parents are written first."""
        paths = [self._path(key) for key in keys]
        return self._call([lambda: asyncio.run(self._num_present(paths))], deadline)[0] if paths else 0

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Read an object, a long one by several requests at once."""
        path = self._path(key)

        def get(start: int) -> Callable[[], tuple[int, Bytes] | None]:
            return lambda: self._transfer.get(
                path, start=start, num_bytes=_PART_BYTES, most_bytes=most_bytes, deadline=deadline
            )

        (first,) = self._call([get(0)], deadline)
        if first is None:
            return None
        size, head = first
        if head.size == size:
            return head
        memory = self._memory.take(size)
        memory[: head.size] = head
        starts = range(head.size, size, _PART_BYTES)
        for start, part in zip(starts, self._call([get(start) for start in starts], deadline), strict=True):
            if part is None or part[0] != size:
                raise RemoteDamageError("an object changes while it is read")
            memory[start : start + part[1].size] = part[1]
        return memory

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        """Put an object, with If-None-Match unless `replace`."""
        path = self._path(key)
        put = functools.partial(self._transfer.put, path, record, replace=replace, deadline=deadline)
        return self._call([put], deadline)[0]

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Do nothing: objects have no time of their last use. A rule of the bucket may remove old ones."""

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Put namespace.json beside the namespace's records."""
        path = f"{self._folder}{namespace_folder(namespace)}/{DESCRIPTION_FILE}"
        text = np.frombuffer(description, dtype=np.uint8)
        self._call([functools.partial(self._transfer.put, path, text, replace=False, deadline=deadline)], deadline)

    def descriptions(self, deadline: Deadline) -> list[bytes]:
        """Read namespace.json of each namespace. obstore receives the list of folders whole."""

        def find() -> list[str]:
            found = self._obstore.list_with_delimiter(self._store, prefix=self._folder + FORMAT_FOLDER)
            return [str(folder) for folder in found["common_prefixes"]]

        def get(folder: str) -> tuple[int, Bytes] | None:
            size = DESCRIPTION_LIMIT_BYTES
            path = f"{folder}/{DESCRIPTION_FILE}"
            return self._transfer.get(path, start=0, num_bytes=size, most_bytes=size, deadline=deadline)

        (folders,) = self._call([find], deadline)
        texts = [self._call([functools.partial(get, folder)], deadline)[0] for folder in folders[:MOST_NAMESPACES]]
        return [text[1].tobytes() for text in texts if text]

    def close(self) -> None:
        """Close all connections, and let all threads end."""
        self._transfer.close()
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

    def _call(self, works: Sequence[Callable[[], Result]], deadline: Deadline) -> list[Result]:
        """Run requests at the same time, each on a thread, for as long as the deadline allows."""
        errors = self._errors
        try:
            return self._threads.call_all(works, left_s=deadline.left_s)
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as exc:
            raise RemoteRefusedError("the object store does not allow that", code=type(exc).__name__[:-5]) from None
        except (errors.BaseError, OSError, ValueError) as exc:  # the text may name keys of the account
            raise RemoteError(f"the object store does not answer: {type(exc).__name__}") from None


class ObstoreTransfer:
    """Satisfies `ObjectTransfer`, for providers for which obstore does not sign with all kinds of credentials.

    The provider is trusted in one thing: obstore receives the body of a refusal whole, however long it is.
    """

    def __init__(self, obstore: Any, store: Any) -> None:
        self._obstore = obstore
        self._errors: Any = obstore.exceptions
        self._store = store
        self._memory = RecordMemory()

    def get(
        self, path: str, *, start: int, num_bytes: int, most_bytes: int, deadline: Deadline
    ) -> tuple[int, Bytes] | None:
        try:
            found = self._obstore.get(self._store, path, options={"range": (start, start + num_bytes)})
        except (self._errors.NotFoundError, FileNotFoundError):
            return None
        size = int(found.meta["size"])
        if not start < size <= most_bytes:
            raise RemoteDamageError(f"an object of {size} bytes is no record of this layout")
        if not start:
            deadline.allow_bytes(size)
        wanted = min(size - start, num_bytes)
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

    def put(self, path: str, record: Bytes, *, replace: bool, deadline: Deadline) -> bool:
        mode = "overwrite" if replace else "create"
        try:
            self._obstore.put(self._store, path, record.data, mode=mode, use_multipart=False)
        except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
            return False
        return True

    def close(self) -> None:
        """Do nothing: obstore closes its connections itself."""


def _import_obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as exc:
        raise ConfigError("a remote tier of objects needs obstore", hint="pip install 'tierkv[objects]'") from exc
    return obstore
