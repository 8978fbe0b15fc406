"""RemoteUrl: the address of a remote tier. Its repr and its text leave out the password."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from tierkv.errors import ConfigError
from tierkv.remote_tiers.protocol import CallTime

__all__ = ["RemoteOption", "RemoteUrl", "remote_urls"]

_COMMON = ("base_s", "mb_per_s", "read_only", "min_blocks")
_REDIS = ("ttl_s", "ca", "cert", "key", "cluster", "sentinel")
_OPTIONS = {
    "redis": _REDIS,
    "rediss": _REDIS,
    "s3": ("endpoint", "region", "allow_http"),
    "gs": ("endpoint",),
    "az": ("endpoint", "account"),
    "dir": ("max_bytes", "min_free_bytes"),
}
_FLAGS = ("read_only", "cluster", "allow_http")
_NUMBERS = ("base_s", "mb_per_s", "min_blocks", "ttl_s", "max_bytes", "min_free_bytes")
_FROM_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HINT = "such as redis://host:6379/0, rediss://user:${PASSWORD}@host:6380, s3://bucket/folder or dir:///mnt/shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteUrl:
    """A remote tier's address.

    hosts: (name, port) of the servers, port 0 where none is named; for objects the bucket or container. path: after the
    host, without its first "/"; of a directory the whole path. credentials: user name and password as they are written;
    `${NAME}` in them stands for a variable of the environment. options: what follows the question mark. text: the URL
    as it was given, which may have a password.

    >>> print(RemoteUrl.parse("rediss://app:secret@cache.example:6380/2?ttl_s=3600"))
    rediss://cache.example:6380/2?ttl_s=3600
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    credentials: tuple[str, str] = field(default=("", ""), repr=False)
    options: tuple[tuple[str, str], ...] = ()
    text: str = field(default="", repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> RemoteUrl:
        """Return the address that a text means. Raises ConfigError, without the text: it may hold a password."""
        if not isinstance(text, str):
            raise ConfigError(f"a remote tier is named by a URL, not by {type(text).__name__}", hint=_HINT)
        scheme = text.split("://", 1)[0].lower() if "://" in text else ""
        if scheme not in _OPTIONS:
            raise ConfigError(f"a remote tier's URL begins with one of {', '.join(_OPTIONS)}", hint=_HINT)
        try:
            parts = urlsplit(text)
            user_info, _, host_part = parts.netloc.rpartition("@")
            user, _, password = user_info.partition(":")
            hosts = tuple(_host(each) for each in host_part.split(",")) if host_part else ()
            options = tuple(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            path = unquote(parts.path)
        except ValueError:  # whose text has a part of the URL
            raise ConfigError(f"a remote tier's URL of scheme {scheme} cannot be read", hint=_HINT) from None
        if scheme.startswith("redis") and "@" in parts.path + parts.query + parts.fragment:
            raise ConfigError(
                "a remote tier's URL has an @ after its host",
                hint="in a password write / as %2F, ? as %3F, # as %23, @ as %40 and a space as %20",
            )
        if parts.fragment:
            raise ConfigError("a remote tier's URL has no part after #: write %23 for that character", hint=_HINT)
        url = cls(
            scheme=scheme,
            hosts=hosts,
            path=path if scheme == "dir" else path.strip("/"),
            credentials=(unquote(user), unquote(password)),
            options=options,
            text=text,
        )
        url._check()
        return url

    def __str__(self) -> str:
        """Return the URL without user name and password."""
        hosts = ",".join(
            (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "") for host, port in self.hosts
        )
        path = self.path if self.scheme == "dir" or not self.path else f"/{self.path}"
        options = "&".join(f"{name}={value}" for name, value in self.options)
        return f"{self.scheme}://{hosts}{path}" + (f"?{options}" if options else "")

    def option(self, name: str) -> str | None:
        """Return the text of an option, or None."""
        return dict(self.options).get(name)

    def flag(self, name: str) -> bool:
        """Return whether an option is set."""
        return self.option(name) in ("1", "true", "yes")

    def number(self, name: str, default: float) -> float:
        """Return the number of an option."""
        text = self.option(name)
        return default if text is None else float(text)

    def call_time(self) -> CallTime:
        """Return how long calls may take."""
        return CallTime(base_s=self.number("base_s", 0.3), bytes_per_s=self.number("mb_per_s", 50) * 1e6)

    def secrets(self, environ: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
        """Return user name and password, None for each that is not named.

        Raises ConfigError for a variable that the environment lacks.
        """

        def value_of(match: re.Match[str]) -> str:
            if match[1] not in environ:
                raise ConfigError(f"the environment has no variable {match[1]}, which {self} names")
            return environ[match[1]]

        user, password = (_FROM_ENVIRONMENT.sub(value_of, each) or None for each in self.credentials)
        return user, password

    def _check(self) -> None:
        """Raise ConfigError for what the scheme cannot have."""
        known = (*_COMMON, *_OPTIONS[self.scheme])
        for name, value in self.options:
            if name not in known:
                raise ConfigError(f"{self.scheme} has no option {name!a}", hint=f"it has {', '.join(known)}")
            if name in _FLAGS and value not in ("0", "1", "false", "true", "no", "yes"):
                raise ConfigError(f"{name} must be true or false")
            if name in _NUMBERS and not _is_positive(value):
                raise ConfigError(f"{name} must be a positive number")
        if len({name for name, _ in self.options}) < len(self.options):
            raise ConfigError("a remote tier's URL names an option twice")
        if self.scheme == "dir":
            if self.hosts or any(self.credentials) or not self.path.startswith("/") or not _is_path(self.path):
                raise ConfigError("a shared directory is named dir:///path, with three slashes")
        elif not self.hosts or not all(host for host, _ in self.hosts):
            raise ConfigError(f"a URL of scheme {self.scheme} names a host or a bucket", hint=_HINT)
        elif self.scheme in ("s3", "gs", "az") and (any(self.credentials) or len(self.hosts) > 1):
            raise ConfigError(
                f"a URL of scheme {self.scheme} names one bucket and no password",
                hint="the credentials come from the provider's own variables, files and roles",
            )
        elif self.scheme.startswith("redis") and self.path and not self.path.isdigit():
            raise ConfigError("the path of a Redis URL is the number of a database", hint=_HINT)


RemoteOption: TypeAlias = "str | RemoteUrl | Sequence[str | RemoteUrl] | None"
"""How an option names remote tiers; see `remote_urls`."""


def remote_urls(value: object) -> tuple[RemoteUrl, ...]:
    """Return the addresses that an option means: None, one URL, several in a sequence, or several with spaces between.

    Raises ConfigError.
    """
    if value is None:
        return ()
    if isinstance(value, RemoteUrl):
        return (value,)
    if isinstance(value, str):
        return tuple(RemoteUrl.parse(each) for each in value.split())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return tuple(each if isinstance(each, RemoteUrl) else RemoteUrl.parse(each) for each in value)
    raise ConfigError(f"remote must be a URL or several, not {type(value).__name__}", hint=_HINT)


def _host(text: str) -> tuple[str, int]:
    """Return name and port. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    return (parts.hostname or "", parts.port or 0)


def _is_path(text: str) -> bool:
    """Return whether the system can have a file of that path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
