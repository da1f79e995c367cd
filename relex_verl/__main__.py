"""`relex-verl` and `python -m relex_verl`."""

import sys

from relex_verl import __version__

__all__ = ["main"]


def main() -> None:
    """The command line. Its version is told without the seconds that the commands take to load torch."""
    if sys.argv[1:] == ["--version"]:
        print(f"relex-verl {__version__}")
        return
    from relex_verl.cli import app
    from relex_verl.cli.signals import end_cleanly_when_terminated

    end_cleanly_when_terminated()
    app(prog_name="relex-verl")


if __name__ == "__main__":
    main()
