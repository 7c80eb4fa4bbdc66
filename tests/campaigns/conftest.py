"""The fixture of all campaigns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from families.campaign import Campaign


@pytest.fixture(scope="session")
def _polite() -> None:
    """Once, not for each campaign: the fourth would get no time on a machine that does anything else."""
    os.nice(5)


@pytest.fixture
def campaign(request: pytest.FixtureRequest, _polite: None) -> Iterator[Callable[[str], Campaign]]:
    """``campaign("12")`` begins the campaign of RELIABILITY item 12, named after the test."""
    option = request.config.getoption
    with contextlib.ExitStack() as stack:
        path = option("--campaign-out")
        out = stack.enter_context(open(path, "a")) if path else None
        capture = request.config.pluginmanager.getplugin("capturemanager")
        stack.enter_context(capture.global_and_fixture_disabled())
        yield lambda item: Campaign(
            request.node.name, item, option("--campaign-seed"), option("--campaign-scale"), out
        )
