"""Each rendering that no dead lease allows is found in the journal, and those that one allows are not called wrong."""

from __future__ import annotations

from tests.faults.lease_journal import Journal, Line, judge

LEASE_S = 10.0


def lines(*words: str) -> list[Line]:
    """`"3.5 1 begun"`: runner 1 begins job `a` at 3.5 s."""
    return [
        Line(float(at), int(runner), what, "" if what == "killed" else "a", 1)
        for at, runner, what in map(str.split, words)
    ]  # type: ignore[arg-type]


def kinds(*words: str, gone_seen: bool = False, done_at: float | None = None) -> list[str]:
    done = {} if done_at is None else {"a": done_at}
    return [problem.kind for problem in judge(lines(*words), LEASE_S, gone_seen=gone_seen, done=done)]


def test_one_rendering_is_allowed():
    assert kinds("0 0 taken", "1 0 begun", "2 0 renewed", "3 0 released", done_at=2.5) == []


def test_a_second_runner_beside_a_live_lease_is_found():
    assert kinds("0 0 taken", "1 0 begun", "5 1 taken", "6 1 begun") == ["rendered twice"]
    assert kinds("0 0 taken", "1 0 begun", "9 0 renewed", "12 1 taken", "13 1 begun") == ["rendered twice"]


def test_a_second_runner_after_a_dead_lease_is_allowed():
    assert kinds("0 0 taken", "1 0 begun", "9 0 renewed", "19 1 taken", "20 1 begun") == []


def test_a_killed_runner_is_taken_over_at_once_where_its_end_can_be_seen():
    words = ("0 0 taken", "1 0 begun", "2 0 killed", "3 1 taken", "4 1 begun")
    assert kinds(*words, gone_seen=True) == []
    assert kinds(*words) == ["rendered twice"]
    assert kinds("0 0 taken", "1 0 begun", "2 1 taken", "2.5 0 killed", "4 1 begun", gone_seen=True) == [
        "rendered twice"
    ]


def test_a_job_that_was_given_back_is_not_rendered_again():
    assert kinds("0 0 taken", "1 0 begun", "2 0 released", "30 1 taken", "31 1 begun") == ["rendered twice"]


def test_one_lease_is_good_for_one_rendering():
    assert kinds("0 0 taken", "1 0 begun", "2 0 renewed", "3 0 begun") == ["rendered twice"]


def test_a_rendering_without_a_lease_is_found():
    assert kinds("0 0 renewed", "1 0 begun") == ["no lease"]


def test_a_runner_that_was_suspended_before_it_began_cannot_know():
    """Its own lease died before; the other's rendering stays the last one that counts."""
    suspended = ("0 0 taken", "11 1 taken", "12 1 begun", "13 0 begun", "14 1 renewed")
    assert kinds(*suspended) == []
    assert kinds(*suspended, "15 2 taken", "16 2 begun") == ["rendered twice"]


def test_nothing_is_rendered_after_it_was_seen_to_be_done():
    words = ("0 0 taken", "1 0 begun", "13 1 taken", "14 1 begun")
    assert kinds(*words, done_at=12.0) == ["rendered again"]
    assert kinds(*words, done_at=13.5) == [], "its record came after the lease was taken over"


def test_the_journal_keeps_what_was_written_by_time(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.write(1, "begun", "job2", 3)
    journal.write(0, "taken", "job2", at=0.25)
    first, second = journal.lines()
    assert first == Line(0.25, 0, "taken", "job2")
    assert (second.runner, second.what, second.job, second.seeds) == (1, "begun", "job2", 3)
