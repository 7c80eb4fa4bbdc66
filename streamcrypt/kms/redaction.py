"""Keeps key material of KMS calls out of botocore's debug log.

At DEBUG, botocore logs every response body (``botocore.parsers``) and every request body
(``botocore.endpoint``): for KMS these hold plaintext data keys in Base64.
"""

from __future__ import annotations

import logging
from typing import Final

# Members of KMS requests and responses that are secret.  A record with one of these names is
# withheld whole: a cut-off body may hold half a key without its closing quote.
_SECRET_MEMBERS: Final = ("Plaintext", "SharedSecret", "KeyMaterial")
_LOGGERS: Final = ("botocore.parsers", "botocore.endpoint")


class _WithholdSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if any(member in message for member in _SECRET_MEMBERS):
            record.msg = "a KMS request or response with key material (withheld by streamcrypt)"
            record.args = ()
        return True


_FILTER: Final = _WithholdSecrets()


def withhold_secrets_from_logs() -> None:
    """Withhold KMS key material from botocore's log, in this process, from now on.  Repeatable."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
