"""A KMS that fails while a job runs, and comes back (RELIABILITY 18; 60 s of it: tests/campaigns/test_keys.py)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from families.outages import FAULTS, served_through_a_proxy
from families.trees import assert_nothing_partial, leftovers, make_tree

import streamcrypt as sc
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.reference import encrypting_keyring


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "drip"])
def test_a_job_goes_on_by_itself(fault: str, home: Path, tmp_path: Path) -> None:
    """The fault begins when some files are done, and ends when calls have met it.

    (An answer that drips is waited for until the deadline.)
    """
    contents = make_tree(tmp_path / "in", {f"{i:03}": 100 for i in range(60)})
    with served_through_a_proxy(home) as (reference, proxy):
        keyring = encrypting_keyring(reference, stats=KmsStats())
        done = threading.Event()

        def count(progress: sc.Progress) -> None:
            if progress.files == 20 and not done.is_set():
                done.set()
                proxy.break_down(fault)
                recovery.start()

        recovery = threading.Timer(1.0, proxy.recover)
        report = sc.encrypt(
            tmp_path / "in", tmp_path / "enc", keys=keyring, workers=2, fsync=False, progress=count,
            cache=sc.DataKeyCache(max_messages=1),
        )  # fmt: skip
        recovery.join()
        assert done.is_set()
        assert not report.failed
        assert assert_nothing_partial(tmp_path / "enc", contents, reference) == len(contents)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_that_does_not_end_is_temporary_and_is_resumed(
    fault: str, home: Path, tmp_path: Path
) -> None:
    """No call outlives its deadline, whatever the fault; the next run finishes the job."""
    contents = make_tree(tmp_path / "in", {f"{i:03}": 100 for i in range(40)})
    words = {"workers": 2, "fsync": False, "cache": sc.DataKeyCache(max_messages=1)}
    with served_through_a_proxy(home) as (reference, proxy):
        keyring = encrypting_keyring(reference, stats=KmsStats())
        keyring._calls._deadline = 1.5  # type: ignore[attr-defined]  # seconds, instead of more than a minute

        def count(progress: sc.Progress) -> None:
            if progress.files == 20:
                proxy.break_down(fault)

        with pytest.raises(sc.KeyUnavailableError) as caught:
            sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=keyring, progress=count, **words)
        assert isinstance(caught.value, sc.TemporaryError)
        assert proxy.dripped == 0  # no call waited for the end of its answer, minutes later
        proxy.recover()
        assert_nothing_partial(tmp_path / "enc", contents, reference)
        assert not leftovers(tmp_path / "enc")
        report = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=reference, resume=True, **words)
        assert report.skipped > 0
        sc.verify(tmp_path / "enc", keys=reference, against=tmp_path / "in")
