"""What the tests of plans need besides records: a bucket, for plans of what is in a store."""

from families.s3 import bucket, client, impatient, server

__all__ = ["bucket", "client", "impatient", "server"]
