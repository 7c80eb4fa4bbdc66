"""A campaign: many trials of one reliability item, each a JSON line, and a summary with its bound."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import IO, Any


class Campaign:
    """Counts trials; ``check`` inside a trial collects what was violated instead of stopping."""

    def __init__(self, name: str, item: str, seed: int, scale: float, out: IO[str] | None) -> None:
        self.name, self.item, self.seed, self._out = name, item, seed, out
        self._scale = scale
        self.trials = 0
        self.failures: list[str] = []
        self.notes: dict[str, Any] = {}
        self._started = time.monotonic()
        print(f"\n{name}: RELIABILITY item {item}, seed {seed}, scale {scale}", flush=True)

    def number(self, full: int) -> int:
        """How many trials to run of ``full``."""
        return max(1, round(full * self._scale))

    def trial(self, failure: str | None = None, *, count: int = 1, quiet: bool = False, **facts: Any) -> None:
        """One trial (or ``count`` alike); ``failure`` says what was violated.

        ``quiet`` leaves out the line of a trial that went well: for campaigns of a million.
        """
        self.trials += count
        if failure is not None:
            self.failures.append(failure)
        if self._out is not None and not (quiet and failure is None):
            line = {"campaign": self.name, "trial": self.trials, "failure": failure, **facts}
            self._out.write(json.dumps(line, default=str) + "\n")
            self._out.flush()

    def finish(self) -> None:
        """Print the summary and fail when a trial did."""
        n, failed = self.trials, len(self.failures)
        summary = {
            "campaign": self.name,
            "item": self.item,
            "seed": self.seed,
            "trials": n,
            "failures": failed,
            # Rule of three: 0 failures of n leave a rate of at most 3 / n with 95 % confidence.
            "upper_bound_95": 3 / n if n and not failed else None,
            "seconds": round(time.monotonic() - self._started, 1),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **self.notes,
        }
        print(json.dumps(summary), flush=True)
        if self._out is not None:
            self._out.write(json.dumps({"summary": summary}, default=str) + "\n")
            self._out.flush()
        assert n > 0
        assert not self.failures, self.failures[:5]
