"""``python -m memsafe``, and the command ``memsafe``: see :mod:`memsafe.cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the extra ``cli``, say how to install it."""
    try:
        from memsafe.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit('error: the command line needs more; run: pip install "memsafe[cli]"')
    app(prog_name="memsafe")


if __name__ == "__main__":
    main()
