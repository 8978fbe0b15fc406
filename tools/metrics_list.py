"""`tierkv metrics`: every metric that tierkv shows to Prometheus."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from tierkv.integrations.vllm.statistics import metrics_of_connector
from tierkv.metrics.catalogue import groups
from tierkv.metrics.metric import Metric
from tierkv.tools.options import AsJson
from tierkv.tools.terminal import open_console, print_json

__all__ = ["metrics"]

_WHERE = {
    "cache": "tierkv.serve_metrics(cache, 9464), and tierkv serve",
    "serve": "tierkv serve, at /metrics",
    "daemon": "tierkv daemon start --metrics-port 9465",
    "vllm": "vLLM's own /metrics, with the tierkv connector",
}


def metrics(
    of: Annotated[
        str | None, typer.Argument(metavar="[PART]", help="Only those of: " + ", ".join(_WHERE) + ".")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every metric for Prometheus: name, type, labels, meaning.

    Units are in the names: _bytes, _seconds. A counter ends in _total. Example: tierkv metrics daemon
    """
    found = {**groups(), "vllm": metrics_of_connector()}
    if of is not None and of not in found:
        raise typer.BadParameter(f"{of[:40]!r} is none of {', '.join(found)}")
    chosen = found if of is None else {of: found[of]}
    if as_json:
        print_json({part: [_plain(each) for each in some] for part, some in chosen.items()})
        return
    width = open_console().width
    for part, some in chosen.items():
        print(f"{part}: {_WHERE[part]}")
        for each in some:
            labels = "{" + ", ".join(each.labels) + "}" if each.labels else ""
            print(f"  {each.exposed_name}{labels}, {each.kind.value}")
            print(textwrap.fill(each.help, width, initial_indent="    ", subsequent_indent="    "))


def _plain(metric: Metric) -> dict[str, object]:
    return {
        "name": metric.exposed_name,
        "type": metric.kind.value,
        "labels": list(metric.labels),
        "help": metric.help,
    }
