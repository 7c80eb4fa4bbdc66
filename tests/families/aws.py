"""boto3 clients by the environment of the test (the fixture ``aws``: moto's server)."""

from __future__ import annotations

from typing import Any


def aws_client(service: str, region: str = "eu-central-1") -> Any:
    import boto3

    return boto3.session.Session().client(service, region_name=region)
