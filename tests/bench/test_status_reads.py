from __future__ import annotations

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_status_reads(tmp_path):
    """One GET a job for its record, many at once, and listings; a second look lists alone."""
    found, printed = run_bench("status_reads", tmp_path, "--jobs", "60", "--latency-ms", "3")
    first, second, pairs, plain = found["rows"]
    assert first["requests"] == {"GET": 61, "LIST": 2}
    assert second["requests"] == {"LIST": 2}
    assert (pairs["requests"], plain["requests"]) == ({"GET": 120}, {"GET": 60})
    assert first["floor_s"] == round(63 * 0.003 / 32, 2)
    assert 0 < first["seconds"] < 60 * 0.003 + 20 and first["times_status"] == 1
    assert "60 done jobs on S3, 3 ms a request" in printed and "limit" not in printed
