"""Tiers beyond this machine: Redis or Valkey, object stores, shared directories.

A remote tier keeps records as they are on disk, under keys that name format, namespace and block. Nothing that comes
back is trusted: `storage/record.py` checks it against the tokens of the prompt, so a remote tier that is stale, cut or
hostile costs misses.
"""
