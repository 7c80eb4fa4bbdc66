"""Capacity planning: a job predicted from measured records, before it is run.

``predict.predict`` and ``predict.solve`` are the doors; ``REFERENCE`` are the records of one machine
that ship with the package, so that a plan works before anything was measured here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

REFERENCE: Final = Path(__file__).with_name("reference.json")
