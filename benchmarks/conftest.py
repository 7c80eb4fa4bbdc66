"""What pytest-benchmark keeps of a run: the machine as far as speed depends on it, and no one's name."""

from __future__ import annotations

import warnings
from typing import Any


def pytest_configure(config: Any) -> None:
    if config.pluginmanager.hasplugin("benchmark"):
        # That stored figures are of another machine is said, and is no failure of the session.  The plugin
        # says it while it is configured, which comes after this.
        from pytest_benchmark.logger import PytestBenchmarkWarning

        warnings.simplefilter("default", PytestBenchmarkWarning)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch"):  # how somebody's folder and branch are called
        commit_info.pop(name, None)
