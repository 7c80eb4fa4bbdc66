"""Real boto3 KMS clients: answered in this process, by a running ``kms serve``, or by AWS.

A client of the embedded KMS is boto3's own: names, parameter checks, errors, paginators and
retries are botocore's.  Only its HTTP request never leaves: botocore's ``before-send`` event
is answered from the service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.configprovider import ConstantProvider

from streamcrypt.errors import KeyAccessError
from streamcrypt.kms import principals, shapes, wire
from streamcrypt.kms.policy import ROOT, Caller
from streamcrypt.kms.redaction import withhold_secrets_from_logs
from streamcrypt.kms.service import Service

# The in-process client needs an endpoint to build requests for; nothing is ever sent to it.
_NOWHERE: Final = "http://kms.local.invalid"


def make_client(
    reference: str = "local",
    *,
    service: Service | None = None,
    caller: Caller = ROOT,
    home: Path | str | None = None,
    **options: Any,
) -> Any:
    """A boto3 KMS client for ``local``, ``local@URL`` or ``aws``; ``options`` go to boto3.

    ``service``, ``caller`` and ``home`` choose for ``local`` which embedded KMS answers, and
    whom it takes the caller for.
    """
    withhold_secrets_from_logs()
    if reference == "local":
        return _in_process(service, caller, home, options)
    if reference.startswith("local@"):
        return _over_http(reference.removeprefix("local@"), home, options)
    if reference == "aws":
        return boto3.client("kms", **options)
    raise ValueError(f"{reference!r} is no KMS; write local, local@http://HOST:PORT or aws")


def _in_process(
    service: Service | None, caller: Caller, home: Path | str | None, options: dict[str, Any]
) -> Any:
    if service is None:
        from streamcrypt.kms import open_service

        service = open_service(home)
    region = options.pop("region_name", service.region)
    config = Config(signature_version=UNSIGNED)
    if "config" in options:
        config = options.pop("config").merge(config)
    client = _plain_session().client(
        "kms", region_name=region, endpoint_url=_NOWHERE, config=config, **options
    )
    client.meta.events.register("before-send.kms", _Answerer(service, caller, region))
    return client


class _Answerer:
    """Answers botocore's requests from the service."""

    def __init__(self, service: Service, caller: Caller, region: str) -> None:
        self._service = service
        self._caller = caller
        self._region = region

    def __call__(self, request: Any, **_: Any) -> AWSResponse:
        target = request.headers["X-Amz-Target"]
        if isinstance(target, bytes):
            target = target.decode()
        body = request.body.encode() if isinstance(request.body, str) else request.body
        answer = wire.answer(self._service, target, body, caller=self._caller, region=self._region)
        headers: Any = {"x-amzn-RequestId": answer.request_id, "Content-Type": wire.CONTENT_TYPE}
        return AWSResponse(request.url, answer.status, headers, _Body(answer.body))


class _Body:
    """What AWSResponse reads from: the one method of urllib3's response that it calls."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self._body


def _over_http(url: str, home: Path | str | None, options: dict[str, Any]) -> Any:
    options.setdefault("region_name", shapes.LOCAL_REGION)
    if "aws_access_key_id" in options or "AWS_ACCESS_KEY_ID" in os.environ:
        # A session of its own: boto3's default one keeps the first credentials that it has read.
        return boto3.session.Session().client("kms", endpoint_url=url, **options)
    # A server of this home: take the root user's access key from its store.
    from streamcrypt.kms import default_home, open_service

    place = Path(home) if home is not None else default_home()
    if not (place / "kms").is_dir():
        raise KeyAccessError(
            f"{url}: no access key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those that "
            "`streamcrypt kms env` prints on the server's machine"
        )
    key = principals.access_key(open_service(place).store, ROOT.arn)
    return _plain_session().client(
        "kms", endpoint_url=url, aws_access_key_id=key.id, aws_secret_access_key=key.secret, **options
    )


def _plain_session() -> Any:
    """A boto3 session that no profile or configuration file of the user's AWS set-up touches."""
    session = botocore.session.Session()
    session.get_component("config_store").set_config_provider("profile", ConstantProvider(None))
    session.set_config_variable("config_file", os.devnull)
    session.set_config_variable("credentials_file", os.devnull)
    return boto3.session.Session(botocore_session=session)
