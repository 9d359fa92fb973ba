"""The grader pool: every ticket once, in time, whatever the graders do."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from openmimo.errors import SandboxError
from openmimo.rl.graders import Grade, GraderPool
from openmimo.tasks import Problem, sample_problem

OBEY = "pool_graders:obey"


@pytest.fixture(autouse=True)
def graders_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool(2, timeout_s=1.0, grader=OBEY) as made:
        yield made


def problem(index: int = 0) -> Problem:
    return Problem("p", "s", "a", "math", "add", 1, f"key {index}")


def outcomes(grades: list[Grade]) -> list[tuple[float, str]]:
    return [(grade.score, grade.status) for grade in grades]


def poll_all(pool: GraderPool, count: int, seconds: float = 60.0) -> list[Grade]:
    """`count` grades, and the proof that no more come."""
    found: list[Grade] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        found += pool.poll(1.0)
    time.sleep(0.05)
    return found + pool.poll()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_real_problems_get_the_scores_of_their_graders(num_workers: int) -> None:
    """Catches problems that change on their way, and grades out of order."""
    problems = [
        sample_problem(domain, split="train", level=1, seed=3, index=index)
        for index in range(20)
        for domain in ("math", "code", "logic", "retrieval")
    ]
    pairs = [(p, p.solution if i % 3 else "answer: no ü \ud800") for i, p in enumerate(problems)]
    with GraderPool(num_workers) as pool:
        grades = pool.grade_all(pairs)
    assert outcomes(grades) == [(1.0 if i % 3 else 0.0, "ok") for i in range(len(pairs))]
    assert all(grade.seconds >= 0 for grade in grades)


def test_tickets_and_polls(pool: GraderPool) -> None:
    """Catches grades handed out twice or to the wrong caller."""
    tickets = [pool.submit(problem(), str(i / 10)) for i in range(5)]
    assert outcomes(pool.grade_all([(problem(), "1"), (problem(), "0.5")])) == [(1.0, "ok"), (0.5, "ok")]
    grades = poll_all(pool, 5)
    assert {grade.ticket: grade.score for grade in grades} == {ticket: i / 10 for i, ticket in enumerate(tickets)}
    assert pool.poll() == []
    start = time.monotonic()
    assert pool.poll(30.0) == []
    assert time.monotonic() - start < 10  # nothing is due, so there is nothing to wait for


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("hang", "timeout"),
        ("spin", "timeout"),
        ("deaf", "timeout"),
        ("sleep 30", "timeout"),
        ("kill", "error"),
        ("leave", "error"),
        ("fork", "error"),
        ("exit", "error"),
        ("raise", "error"),
        ("no number", "error"),
        ("nan", "error"),
        ("inf", "error"),
        ("1.5", "error"),
        ("-0.1", "error"),
    ],
)
def test_a_misfortune_costs_its_own_ticket_alone(pool: GraderPool, response: str, status: str) -> None:
    """Catches tickets lost with the process that had them, or punished for their neighbour."""
    responses = ["1"] * 40 + [response] + ["0.25"] * 40
    expected = [(1.0, "ok")] * 40 + [(0.0, status)] + [(0.25, "ok")] * 40
    assert outcomes(pool.grade_all((problem(), text) for text in responses)) == expected


def test_a_grader_that_prints_or_reads_does_not_disturb(pool: GraderPool) -> None:
    """Catches an exchange that runs over the streams that graders use."""
    assert outcomes(pool.grade_all([(problem(), "print"), (problem(), "1")])) == [(0.5, "ok"), (1.0, "ok")]


def test_processes_import_no_torch(pool: GraderPool) -> None:
    """Catches seconds and gigabytes spent on every grading process."""
    assert outcomes(pool.grade_all([(problem(), "torch")] * 4)) == [(0.0, "ok")] * 4


def test_a_thousand_tickets_are_graded_exactly_once(pool: GraderPool, tmp_path: Path) -> None:
    """Catches tickets lost, graded twice or handed out twice among processes that die all the time."""
    rng = random.Random(5)
    graded = tmp_path / "graded"
    kinds = [rng.choices(["count", "kill", "leave", "raise"], [96, 1.5, 1, 1.5])[0] for _ in range(1000)]
    kinds[500] = kinds[700] = "hang"
    expected = {"count": "ok", "hang": "timeout", "kill": "error", "leave": "error", "raise": "error"}
    tickets = [pool.submit(problem(i), f"count {graded}" if kind == "count" else kind) for i, kind in enumerate(kinds)]
    grades = poll_all(pool, 1000)
    assert sorted(grade.ticket for grade in grades) == sorted(tickets)
    by_ticket = {grade.ticket: grade.status for grade in grades}
    assert [by_ticket[ticket] for ticket in tickets] == [expected[kind] for kind in kinds]
    runs = Counter(graded.read_text().splitlines())
    assert runs == {f"key {i}": 1 for i, kind in enumerate(kinds) if kind == "count"}


def test_time_is_counted_per_response_not_per_batch(pool: GraderPool) -> None:
    """Catches a time-out that a whole batch shares, and one that runs while nobody polls."""
    tickets = [pool.submit(problem(), "sleep 0.2") for _ in range(20)]
    time.sleep(3.0)
    grades = poll_all(pool, 20)
    assert outcomes(grades) == [(1.0, "ok")] * 20
    assert len(tickets) == 20


def test_a_full_queue_waits() -> None:
    """Catches a queue that grows without bound, and a wait that never ends."""
    with GraderPool(1, timeout_s=5.0, queue_size=4, grader=OBEY) as pool:
        start = time.monotonic()
        for _ in range(8):
            pool.submit(problem(), "sleep 0.1")
        assert time.monotonic() - start > 0.3
        assert len(poll_all(pool, 8)) == 8


def test_closing_ends_everything() -> None:
    """Catches processes left behind, and a close that waits for graders that hang."""
    pool = GraderPool(2, timeout_s=60.0, grader=OBEY)
    for _ in range(4):
        pool.submit(problem(), "hang")
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 10
    with pytest.raises(SandboxError, match="closed"):
        pool.submit(problem(), "1")
    assert pool.poll(5.0) == []


@pytest.mark.parametrize("grader", ["pool_graders:absent", "no_such_module:grade"])
def test_a_grader_that_cannot_be_imported_is_an_error(grader: str) -> None:
    """Catches a pool that starts processes for ever."""
    with pytest.raises(SandboxError, match="end before they start"):
        GraderPool(1, grader=grader)


def test_impossible_pools_are_refused() -> None:
    """Catches numbers with which nothing would ever be graded."""
    for wrong in ({"num_workers": -1}, {"timeout_s": 0.0}, {"queue_size": 0}):
        with pytest.raises(SandboxError, match="expected"):
            GraderPool(**wrong)  # type: ignore[arg-type]
