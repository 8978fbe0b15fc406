"""Where the command `tierkv` and `python -m tierkv` begin: Ctrl-C is heard while everything else is still imported."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; never returns."""
    try:
        from tierkv.tools import cli  # seconds, most of them torch's

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
