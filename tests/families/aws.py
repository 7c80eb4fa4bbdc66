"""boto3 clients by the environment of the test (the fixture ``aws``: moto's server)."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def aws_client(service: str, region: str = "eu-central-1") -> Any:
    """A client; making one takes longer than a test, so tests of one server share it."""
    return _client(service, region, os.environ["AWS_ENDPOINT_URL"])


@cache
def _client(service: str, region: str, endpoint: str) -> Any:
    import boto3

    return boto3.session.Session().client(service, region_name=region, endpoint_url=endpoint)
