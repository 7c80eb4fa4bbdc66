"""The object store that several modules here test against."""

from families.s3 import bucket, client, key, server

__all__ = ["bucket", "client", "key", "server"]
