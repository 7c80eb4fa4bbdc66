"""The AWS Encryption SDK message format: bytes in, bytes out, no I/O and no key service.

    message = header body ‖ header authentication ‖ body ‖ footer (signed suites only)

Source: the AWS Encryption SDK specification (awslabs/aws-encryption-sdk-specification,
data-format/message*.md).  No module here imports ``streamcrypt.kms``.
"""
