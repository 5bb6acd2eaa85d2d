import torch

from learner.batch import flatten
from learner.item import Item
from learner.table import Table
from tests.builders import make_group, make_ticket


def table(tickets: tuple[int, ...] = (1, 2, 3), when: tuple[int, int, int] = (0, 0, 0)) -> Table:
    items = [Item(make_ticket(i, n=4), make_group([1, 0, 1, 0], ticket=i)) for i in tickets]
    static = flatten(items, 0).static
    n = static.mask.numel()
    logp = torch.linspace(-3, -0.1, n)
    return Table.join(static, logp, logp, torch.full((n,), 0.5), torch.zeros(n), when)


def names(t: Table, chosen: torch.Tensor) -> set[tuple[int, int, int]]:
    columns = (t.ticket[chosen], t.rollout[chosen], t.position[chosen])
    return set(zip(*(c.tolist() for c in columns), strict=True))


def test_a_draw_takes_the_number_asked_for_from_those_allowed() -> None:
    t = table()
    among = t.position > 3
    chosen = t.draw("clip_cov", 5, among)
    assert int(chosen.sum()) == 5
    assert not (chosen & ~among).any()
    assert torch.equal(t.draw("clip_cov", 10_000, among), among)


def test_a_draw_does_not_depend_on_the_order_of_the_lines_or_on_who_sees_them() -> None:
    t = table()
    everything = torch.ones_like(t.mask)
    wanted = names(t, t.draw("m", 7, everything))
    shuffled = t.take(torch.randperm(len(t.logp), generator=torch.Generator().manual_seed(1)))
    assert names(shuffled, shuffled.draw("m", 7, everything)) == wanted
    # the 7 smallest of the whole are the smallest of the 7 smallest of each half
    half = len(t.logp) // 2
    parts = [t.take(slice(None, half)), t.take(slice(half, None))]
    best = set().union(*(names(p, p.draw("m", 7, torch.ones_like(p.mask))) for p in parts))
    assert wanted <= best


def test_draws_of_other_steps_updates_seeds_and_methods_are_other_draws() -> None:
    everything = torch.ones_like(table().mask)
    draws = [
        names(t, t.draw(method, 8, everything))
        for t, method in [
            (table(), "a"),
            (table(), "b"),
            (table(when=(1, 0, 0)), "a"),
            (table(when=(0, 1, 0)), "a"),
            (table(when=(0, 0, 1)), "a"),
        ]
    ]
    assert all(x != y for i, x in enumerate(draws) for y in draws[:i])


def test_hashes_are_spread_evenly() -> None:
    t = table(tuple(range(400)))
    high = t.hashes("m") >> 60  # the top four bits, signed
    counts = torch.bincount(high + 8, minlength=16)
    expected = len(t.logp) / 16
    assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_the_discriminator_is_zero_for_a_uniform_distribution() -> None:
    t = table()
    n = len(t.logp)
    uniform = Table.join(t, -torch.full((n,), 4.0).log(), t.lp, torch.full((n,), 4.0).log(), t.N)
    assert torch.allclose(uniform.S, torch.zeros(n), atol=1e-6)
