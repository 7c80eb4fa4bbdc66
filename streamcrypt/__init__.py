"""streamcrypt: encrypted datasets, tensors and streams in the AWS Encryption SDK's message format."""
