"""Real boto3 KMS clients: answered in this process, by a running ``kms serve``, or by AWS.

A client of the embedded KMS is boto3's own: names, parameter checks, errors, paginators and
retries are botocore's.  Only its HTTP request never leaves.  What the service answers goes through
botocore's parser at the ``before-call`` event, and no request is even prepared; what it refuses goes
through all of botocore, whose retries and errors these are: its ``before-send`` event is answered.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.configprovider import ConstantProvider
from botocore.loaders import Loader, create_loader
from botocore.parsers import create_parser

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
    answerer = _Answerer(service, caller, region)
    client.meta.events.register("before-call.kms", answerer.call)
    client.meta.events.register("before-send.kms", answerer.send)
    return client


class _Answerer:
    """Answers botocore's requests from the service, each attempt once."""

    def __init__(self, service: Service, caller: Caller, region: str) -> None:
        self._service = service
        self._caller = caller
        self._region = region
        self._parser = create_parser("json")
        self._refused = threading.local()  # the answer to the first attempt, on its way to ``send``

    def call(self, model: Any, params: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
        """What botocore returns to its caller; None for what its errors and retries are for."""
        answer = self._answer(params["headers"]["X-Amz-Target"], params["body"])
        self._refused.answer = answer if answer.status >= 300 else None
        if self._refused.answer is not None:
            return None
        response = _response(params["url"], answer)
        described = {"headers": response.headers, "status_code": answer.status, "body": answer.body}
        parsed = self._parser.parse({**described, "context": {}}, model.output_shape)
        parsed["ResponseMetadata"]["RetryAttempts"] = 0
        return response, parsed

    def send(self, request: Any, **_: Any) -> AWSResponse:
        answer, self._refused.answer = getattr(self._refused, "answer", None), None
        if answer is None:  # another attempt
            answer = self._answer(request.headers["X-Amz-Target"], request.body)
        return _response(request.url, answer)

    def _answer(self, target: str | bytes, body: str | bytes) -> wire.Answer:
        operation = target.decode() if isinstance(target, bytes) else target
        data = body.encode() if isinstance(body, str) else body
        return wire.answer(self._service, operation, data, caller=self._caller, region=self._region)


def _response(url: str, answer: wire.Answer) -> AWSResponse:
    headers: Any = {"x-amzn-RequestId": answer.request_id, "Content-Type": wire.CONTENT_TYPE}
    return AWSResponse(url, answer.status, headers, _Body(answer.body))


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


@cache
def _loader() -> Loader:
    """botocore's service models, read once a process: that of KMS alone takes longer than many calls."""
    return create_loader()


def _plain_session() -> Any:
    """A boto3 session that no profile or configuration file of the user's AWS set-up touches."""
    session = botocore.session.Session()
    session.get_component("config_store").set_config_provider("profile", ConstantProvider(None))
    session.set_config_variable("config_file", os.devnull)
    session.set_config_variable("credentials_file", os.devnull)
    session.register_component("data_loader", _loader())
    return boto3.session.Session(botocore_session=session)
