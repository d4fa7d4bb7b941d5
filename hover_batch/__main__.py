"""Start the program. Loading its libraries takes a second, in which Ctrl-C ends it without a traceback, too."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        from hover_batch.cli import app
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    app()


if __name__ == "__main__":
    main()
