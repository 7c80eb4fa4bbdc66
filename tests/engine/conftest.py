"""What several modules here test against: an object store, and a KMS with keys by partition."""

from families.partitions import kms
from families.s3 import bucket, client, impatient, key, server

__all__ = ["bucket", "client", "impatient", "key", "kms", "server"]
