"""Spans and counters say what the report says, of jobs that succeed and of jobs that fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from families.pages import blocks

import streamcrypt as sc
from streamcrypt import telemetry
from streamcrypt.engine.job import observers
from streamcrypt.keys.kms import KmsKeyring
from streamcrypt.kms import open_service

trace = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
prometheus_client = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return f"raw-aes:tests/telemetry@{path}"


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}").write_bytes(bytes(1000 * number))
    return source


@pytest.fixture(autouse=True)
def nobody_left():
    yield
    assert observers == []


@pytest.fixture
def spans(nobody_left):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = trace.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    stop = telemetry.opentelemetry(provider)
    yield exporter
    stop()


@pytest.fixture
def registry(nobody_left):
    made = prometheus_client.CollectorRegistry()
    stop = telemetry.prometheus(made)
    yield made
    stop()
    assert list(made.collect()) == []


def test_a_span_has_the_figures_of_the_report(spans, key, tree, tmp_path):
    report = sc.encrypt(tree, tmp_path / "out", keys=key, workers=2)
    (span,) = spans.get_finished_spans()
    assert span.name == "streamcrypt encrypt"
    assert span.status.is_ok or span.status.status_code.name == "UNSET"
    found = span.attributes
    for name in ("files", "bytes_in", "bytes_out", "workers", "data_keys", "skipped"):
        assert found[f"streamcrypt.{name}"] == report[name]
    assert found["streamcrypt.files"] == 3
    assert found["streamcrypt.bytes_in"] == 3000
    assert found["streamcrypt.failed"] == 0
    assert found["streamcrypt.cache.misses"] == 1
    assert found["streamcrypt.source"] == str(tree)
    assert (span.end_time - span.start_time) / 1e9 >= report.seconds


def test_a_job_is_a_child_of_the_callers_span_and_the_parent_of_what_happens_in_it(spans, tree, tmp_path):
    from opentelemetry import trace as api

    service = open_service(tmp_path / "home")
    arn = service.create_key()["KeyMetadata"]["Arn"]
    seen = []

    class Watching:
        """The embedded KMS, which notes in whose span it is called."""

        def __getattr__(self, name):
            method = getattr(service, name)
            if name != "generate_data_key":
                return method

            def call(**request):
                seen.append(api.get_current_span().get_span_context().span_id)
                return method(**request)

            return call

    sc.encrypt(tree, tmp_path / "out", keys=KmsKeyring(Watching(), arn))
    (span,) = spans.get_finished_spans()
    assert seen == [span.context.span_id]


def test_a_job_that_fails_is_a_failed_span(spans, key, tree, tmp_path):
    sc.encrypt(tree, tmp_path / "out", keys=key)
    message = tmp_path / "out" / "2"
    damaged = bytearray(message.read_bytes())
    damaged[-20] ^= 1
    message.write_bytes(damaged)
    with pytest.raises(sc.IntegrityError):
        sc.verify(tmp_path / "out", keys=key)
    span = spans.get_finished_spans()[-1]
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["streamcrypt.failed"] == 1
    assert span.attributes["streamcrypt.files"] == 2
    assert [event.attributes["exception.type"] for event in span.events] == [
        "streamcrypt.errors.IntegrityError"
    ]


def test_kms_calls_are_told(spans, registry, home, tree, tmp_path):
    key = open_service(home).create_key()["KeyMetadata"]["KeyId"]
    sc.encrypt(tree, tmp_path / "out", keys=f"local:{key}", cache=False)
    # Three files and the manifest.
    (span,) = spans.get_finished_spans()
    assert span.attributes["streamcrypt.kms.calls.GenerateDataKey"] == 4
    assert span.attributes["streamcrypt.kms.latency_ms.max"] > 0
    assert registry.get_sample_value("streamcrypt_kms_calls_total", {"call": "GenerateDataKey"}) == 4


def test_counters_add_up_over_jobs(registry, key, tree, tmp_path):
    value = registry.get_sample_value
    first = sc.encrypt(tree, tmp_path / "out", keys=key)
    second = sc.decrypt(tmp_path / "out", tmp_path / "back", keys=key)
    with pytest.raises(sc.StreamcryptError):
        sc.encrypt(tree, tmp_path / "out", keys=key)  # everything is there already
    assert value("streamcrypt_jobs_total", {"operation": "encrypt", "outcome": "done"}) == 1
    assert value("streamcrypt_jobs_total", {"operation": "decrypt", "outcome": "done"}) == 1
    assert value("streamcrypt_files_total", {"operation": "encrypt"}) == 3
    assert value("streamcrypt_read_bytes_total", {"operation": "encrypt"}) == 3000
    assert value("streamcrypt_written_bytes_total", {"operation": "encrypt"}) == first.bytes_out
    assert value("streamcrypt_read_bytes_total", {"operation": "decrypt"}) == second.bytes_in
    failures = [
        (sample.labels, sample.value)
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "streamcrypt_jobs_total" and sample.labels["outcome"] != "done"
    ]
    assert [count for _, count in failures] == [1]
    assert value("streamcrypt_job_seconds_count", {"operation": "decrypt"}) == 1
    assert value("streamcrypt_cache_lookups_total", {"result": "misses"}) >= 2


def test_no_secret_and_no_context_is_told(spans, registry, tree, key, tmp_path):
    sc.encrypt(tree, tmp_path / "out", keys=key, context={"Project": "a-private-name"})
    told = str(spans.get_finished_spans()[0].attributes) + str(prometheus_client.generate_latest(registry))
    assert "a-private-name" not in told
    assert bytes(range(32)).hex() not in told


def test_the_instrumentor_of_opentelemetry_instrument(key, tree, tmp_path):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = trace.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.Instrumentor().instrument(tracer_provider=provider)
    telemetry.Instrumentor().instrument(tracer_provider=provider)  # once is enough
    try:
        sc.encrypt(tree, tmp_path / "out", keys=key)
    finally:
        telemetry.Instrumentor().uninstrument()
    sc.verify(tmp_path / "out", keys=key)
    assert [span.name for span in exporter.get_finished_spans()] == ["streamcrypt encrypt"]


def test_the_page(key, tree, tmp_path):
    """The block of docs/performance.md, as it stands."""
    page = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
    (block,) = [block for block in blocks(page) if block.language == "python"]
    names = {}
    exec(compile(block.code, page.name, "exec"), names)
    try:
        sc.encrypt(tree, tmp_path / "out", keys=key)
        assert "streamcrypt_files_total" in prometheus_client.generate_latest().decode()
    finally:
        names["end_spans"]()
        names["end_counters"]()
    assert "streamcrypt_files_total" not in prometheus_client.generate_latest().decode()


def test_importing_the_module_needs_neither_package():
    """A process that calls neither function pays nothing."""
    code = (
        "import sys, streamcrypt; from streamcrypt import telemetry; "
        "assert not any(name.partition('.')[0] in ('opentelemetry', 'prometheus_client') for name in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("package", "start"),
    [("opentelemetry", telemetry.opentelemetry), ("prometheus_client", telemetry.prometheus)],
)
def test_without_the_packages_one_line_says_what_to_install(monkeypatch, package, start):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'streamcrypt\[telemetry\]'"):
        start()
