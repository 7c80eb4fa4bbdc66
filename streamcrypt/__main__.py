"""python -m streamcrypt: the command line."""

from __future__ import annotations

from streamcrypt.cli import run

if __name__ == "__main__":
    raise SystemExit(run())
