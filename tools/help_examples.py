"""The examples that end the help of each command, by its name as it is typed."""

from __future__ import annotations

from typing import Any

__all__ = ["EXAMPLES", "add_examples"]

EXAMPLES: dict[str, tuple[str, ...]] = {
    "warm": ("tierkv warm prompts.txt --pin", "cat prompts.txt | tierkv warm - --dry-run"),
    "run": (
        'tierkv run "How do I reset my key?" --system prompts.txt --nth 2',
        "tierkv run --file questions.txt --system prompts.txt --max-new-tokens 200",
    ),
    "serve": ("tierkv serve path/to/model --port 8000 --hot 8G",),
    "explain": ('tierkv explain "How do I reset my key?" --system prompts.txt --model path/to/model',),
    "report": ("tierkv report prompts.txt --output report",),
    "stats": ("tierkv stats --store /mnt/fast/store",),
    "inspect": ("tierkv inspect --namespace 83060e5a",),
    "save": ("tierkv save state.tkv",),
    "load": ("tierkv load state.tkv --store /mnt/fast/store --cold 64G",),
    "evict": ("tierkv evict --older-than 7d --dry-run", "tierkv evict --to 8G --yes"),
    "quota": ("tierkv quota 64G", "tierkv quota 8G --evict"),
    "compact": ("tierkv compact",),
    "verify": ("tierkv verify --repair",),
    "move": ("tierkv move /mnt/larger/store",),
    "tenant list": ("tierkv tenant list --json",),
    "tenant set": ("tierkv tenant set shop --salt shop-secret --warm-share 2G --cold-limit 64G",),
    "tenant remove": ("tierkv tenant remove shop",),
    "metrics": ("tierkv metrics --json",),
    "examples": ("tierkv examples system_prompts.txt",),
    "tenant": ("tierkv tenant list",),
    "remote": ("tierkv remote check redis://host:6379",),
    "remote check": ("tierkv remote check redis://host:6379",),
    "remote inspect": ("tierkv remote inspect s3://bucket/folder",),
    "top": ("tierkv top --url http://localhost:9464", "tierkv top --once"),
    "replay": ("tierkv replay trace.jsonl --policy lru,hit-density --capacity 1%",),
    "train-policy": ("tierkv train-policy trace.jsonl --out policy.json",),
    "daemon": ("tierkv daemon start --detach --warm 8G", "tierkv daemon status"),
    "daemon start": ("tierkv daemon start --detach --warm 8G --cold 256G",),
    "daemon status": ("tierkv daemon status --json",),
    "daemon stop": ("tierkv daemon stop",),
    "daemon unit": ("tierkv daemon unit > ~/.config/systemd/user/tierkv.service",),
    "daemon prefetch": ("tierkv daemon prefetch prompts.txt --model path/to/model",),
}


def add_examples(command: Any, name: str) -> Any:
    """Put the examples of a command, or of a group and all its commands, below their help; return the command.

    command: as Typer makes it. name: as it is typed behind `tierkv`.
    """
    if examples := EXAMPLES.get(name):
        head = "Example:" if len(examples) == 1 else "Examples:"
        command.epilog = "\n\n".join([head, *examples])
    for each, below in getattr(command, "commands", {}).items():
        add_examples(below, f"{name} {each}")
    return command
