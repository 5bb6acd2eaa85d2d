"""Who holds which ticket: attempts, budgets, expiry."""

from __future__ import annotations

from learner.leases import Leases

A, B = b"a", b"b"


def make_leases(**fields: int) -> Leases:
    return Leases(**{"lease_s": 10.0, "infra_budget": 3, "data_budget": 2, **fields})


def test_an_expired_lease_is_found_and_a_renewed_one_is_not() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    leases.lease(2, A, now=0.0)
    leases.renew([2], A, now=5.0)
    assert leases.overdue(now=11.0) == [1]


def test_only_the_holder_renews() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    leases.renew([1], B, now=9.0)
    assert leases.overdue(now=11.0) == [1]


def test_attempts_count_up_and_a_ticket_given_back_comes_first() -> None:
    leases = make_leases()
    leases.waiting.extend([7, 8])
    assert leases.lease(leases.waiting.popleft(), A, 0.0) == 0
    assert leases.give_back(7, "infra")
    assert list(leases.waiting) == [7, 8]
    assert leases.lease(leases.waiting.popleft(), B, 0.0) == 1


def test_budgets_of_infrastructure_and_data_are_separate() -> None:
    leases = make_leases()
    assert leases.give_back(1, "infra")
    assert leases.give_back(1, "data")
    assert leases.give_back(1, "infra")
    assert not leases.give_back(1, "data")


def test_a_ticket_given_back_untouched_costs_no_budget() -> None:
    leases = make_leases()
    for _ in range(50):
        leases.lease(1, A, 0.0)
        assert leases.give_back(1, "none")
        leases.waiting.clear()


def test_a_failure_counts_only_from_the_holder() -> None:
    leases = make_leases()
    leases.lease(1, A, 0.0)
    leases.give_back(1, "infra")
    leases.waiting.clear()
    leases.lease(1, B, 0.0)
    assert not leases.is_held(1, A, attempt=1)
    assert not leases.is_held(1, B, attempt=0)
    assert leases.is_held(1, B, attempt=1)


def test_a_reconnected_actor_claims_what_it_holds() -> None:
    leases = make_leases()
    leases.lease(1, A, 0.0)
    leases.waiting.append(2)
    leases.claim([1, 2], B, 1.0)
    assert sorted(leases.of(B)) == [1, 2]
    assert not leases.waiting
    assert leases.is_held(1, B, attempt=0)


def test_a_ticket_from_an_earlier_life_may_fail_at_the_attempt_its_actor_remembers() -> None:
    leases = make_leases()
    leases.waiting.append(1)
    leases.claim([1], A, 0.0)
    assert leases.is_held(1, A, attempt=7)


def test_time_in_which_the_learner_stood_still_does_not_count() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    leases.postpone(100.0)
    assert leases.overdue(now=105.0) == []
    assert leases.overdue(now=111.0) == [1]


def test_a_ticket_held_far_longer_than_answers_take_is_slow_and_no_other() -> None:
    leases = make_leases()
    for id_ in (1, 2):
        leases.lease(id_, A, now=0.0)
    leases.lease(3, B, now=0.0)
    assert leases.slow(now=1000.0) == [], "nobody has answered: nobody is slower than others"
    leases.answered(3, B, now=5.0)
    leases.lease(4, B, now=21.0)
    assert leases.slow(now=19.0) == [], "less than four times as long"
    assert leases.slow(now=25.0) == [1, 2]
    assert leases.slow(now=25.1) == [], "it looks a few times a lease"


def test_a_shared_ticket_is_the_others_and_still_takes_room_where_it_was() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    assert leases.share(1, B, now=50.0) == 1, "another attempt"
    assert leases.count() == {A: 1, B: 1}
    assert leases.is_held(1, B, attempt=1)
    assert not leases.is_held(1, A)
    leases.renew([1], A, now=51.0)
    assert leases.count()[A] == 1, "it says that it works on it"
    leases.renew([], A, now=52.0)
    assert leases.count() == {B: 1}


def test_who_leaves_works_on_nothing_any_more() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    leases.share(1, B, now=50.0)
    leases.forget(A)
    assert leases.count() == {B: 1}


def test_who_works_on_a_shared_ticket_is_known_and_has_it_once_when_it_comes_back() -> None:
    leases = make_leases()
    leases.lease(1, A, now=0.0)
    leases.share(1, B, now=50.0)
    assert leases.works_on(1, A), "nobody need ask it again"
    assert leases.works_on(1, B)
    assert not leases.works_on(1, b"c")
    leases.give_back(1, "infra")
    leases.lease(leases.waiting.popleft(), A, now=60.0)
    assert leases.count() == {A: 1}


def test_answers_that_take_long_are_not_shared_for_ever() -> None:
    """Short ones came before, so that the first long ones are slow; whoever had them answers."""
    leases = make_leases()
    leases.lease(0, A, now=0.0)
    leases.answered(0, A, now=1.0)
    leases.lease(1, A, now=10.0)
    assert leases.slow(now=30.0) == [1]
    leases.share(1, B, now=30.0)
    leases.answered(1, A, now=50.0)
    leases.lease(2, A, now=100.0)
    assert leases.slow(now=130.0) == [], "the one before took 40 s"
