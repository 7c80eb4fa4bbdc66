"""Measuring: a sweep of configurations, each a job of its own in a fresh process.

``sweep`` says which cells and in which order, ``measure`` runs one, ``data`` makes the files,
``records`` keeps what came out.  ``streamcrypt plan`` and ``streamcrypt report`` only read records.
"""
