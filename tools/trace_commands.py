"""Commands on a trace of requests: replay, train-policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tierkv.tools import replay as replay_command
from tierkv.tools import train_policy as train_policy_command
from tierkv.tools.cli_options import AsJson, TraceFile, as_path


def replay(
    trace: TraceFile,
    policy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Names with commas between; learned:FILE for a trained one.", show_default="all"),
    ] = None,
    capacity: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Blocks, or a percentage of the unique ones; several with commas.", show_default="10%"),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=as_path, metavar="FILE", help="Draw hit rate over capacity into this PNG."),
    ] = None,
    prefill: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measured prefills, tokens:seconds with commas.", show_default="an 8B model on an H200"),
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of the trace.", min=2, max=1 << 20)] = 512,
    as_json: AsJson = False,
) -> None:
    """Compare eviction policies on a request trace, beside the best that was possible."""
    replay_command.replay(
        trace,
        policies=policy or [],
        capacities=capacity or [],
        plot=plot,
        prefill=prefill,
        block_size=block_tokens,
        as_json=as_json,
    )


def train_policy(
    trace: TraceFile,
    out: Annotated[
        Path,
        typer.Option(parser=as_path, metavar="FILE", help="JSON file to write; the policy is then learned:FILE."),
    ],
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of the trace.", min=2, max=1 << 20)] = 512,
    seed: Annotated[int, typer.Option(help="Draws the conversations that measure the fit.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the learned eviction policy to a request trace."""
    train_policy_command.train_policy(trace, out, block_size=block_tokens, seed=seed, as_json=as_json)
