"""An embedded KMS with a key for each of some partitions, and the map that gives them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamcrypt.kms import Service, open_service

NAMES = ("default", "one", "two", "backup")
RULES = {"subject=1/*": "local:alias/one", "subject=2/*": ["local:alias/two", "local:alias/backup"]}


@pytest.fixture
def kms(home: Path) -> Service:
    service = open_service(home)
    for name in NAMES:
        key = service.create_key()["KeyMetadata"]["KeyId"]
        service.create_alias(AliasName=f"alias/{name}", TargetKeyId=key)
    return service
