"""From a key reference to a data key: references, keyrings, materials, and the data-key cache.

The only package that knows both the message format and the KMS.
"""
