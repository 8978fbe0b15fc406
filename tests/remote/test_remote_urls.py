"""URLs of remote tiers: what they mean, and that no password leaves them."""

from __future__ import annotations

import pickle
import traceback

import pytest

from tierkv.errors import ConfigError
from tierkv.remote_tiers.urls import RemoteUrl, remote_urls

SECRET = "pass-word-42"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://:{SECRET}@host", "redis://host"),
        (f"rediss://user:{SECRET}@host:6380/3?ttl_s=60", "rediss://host:6380/3?ttl_s=60"),
        (f"redis://user:{SECRET}@a:1,b:2,c?cluster=true", "redis://a:1,b:2,c?cluster=true"),
        ("redis://[::1]:7000", "redis://[::1]:7000"),
        ("s3://bucket/some/folder?region=eu-1", "s3://bucket/some/folder?region=eu-1"),
        ("dir:///mnt/shared?max_bytes=1e12", "dir:///mnt/shared?max_bytes=1e12"),
    ],
)
def test_a_url_is_shown_without_its_password(text: str, shown: str) -> None:
    url = RemoteUrl.parse(text)
    assert str(url) == shown
    assert SECRET not in repr(url) + str(url)
    assert pickle.loads(pickle.dumps(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host",
        f"redis://user:{SECRET}@host:port",
        f"redis://user:{SECRET}@host/base",
        f"redis://user:{SECRET}@host?unknown=1",
        f"redis://user:{SECRET}@host?ttl_s=-1",
        f"redis://user:{SECRET}@host?cluster=maybe",
        f"redis://user:{SECRET}@",
        f"redis://user:{SECRET}@host#part",
        f"redis://user:{SECRET}@[host",
        f"s3://user:{SECRET}@bucket",
        f"dir://user:{SECRET}@host/path",
        "dir://relative",
        "redis://host?ttl_s=1&ttl_s=2",
        "dir:///mnt/%00",
        "dir:///mnt/\ud800",
        f"redis://:{SECRET}/x@host",
        f"redis://user:{SECRET}?x@host",
        f"redis://user:1?{SECRET}=2@host",
        f"redis://user:1?{SECRET}@host",
        f"redis://user:1#{SECRET}@host",
        f"redis://user:1/{SECRET}@host",
        f"redis://:{SECRET} @host",
        "",
    ],
)
def test_a_url_that_cannot_be_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        remote_urls(text or [text])
    assert SECRET not in "".join(traceback.format_exception(caught.value, limit=0))


def test_a_password_may_come_from_the_environment() -> None:
    url = RemoteUrl.parse("redis://app:${REDIS_PASSWORD}@host")
    assert url.secrets({"REDIS_PASSWORD": SECRET}) == ("app", SECRET)
    with pytest.raises(ConfigError, match="no variable REDIS_PASSWORD"):
        url.secrets({})
    assert RemoteUrl.parse("redis://host").secrets({}) == (None, None)
    assert RemoteUrl.parse("redis://:a%2Fb@host").secrets({}) == (None, "a/b")


def test_several_urls_are_a_sequence_or_separated_by_spaces() -> None:
    both = remote_urls("redis://a  dir:///b")
    assert [str(url) for url in both] == ["redis://a", "dir:///b"]
    assert remote_urls(["redis://a", both[1]]) == both
    assert remote_urls(None) == () == remote_urls("")
    with pytest.raises(ConfigError):
        remote_urls(3)
