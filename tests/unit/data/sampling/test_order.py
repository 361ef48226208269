"""Which samples come when: once an epoch, and the same for every split of an effective batch."""

from collections import Counter

import pytest

from lora_dist.data.sampling.order import PADDING_INDEX, BatchPlan, MicroBatches, ShuffledOrder, evaluation_batches

SIZES = [(27, 4, 2, 1), (7, 4, 1, 2), (5, 64, 4, 1), (5, 64, 1, 8), (64, 4, 4, 2), (65, 4, 4, 2), (1, 1, 1, 3)]


def order(size: int, batch: int, accumulation: int, world: int, rank: int = 0) -> BatchPlan:
    return BatchPlan(ShuffledOrder(size, seed=3), batch, accumulation, world, rank)


def rows_of(size: int, batch: int, accumulation: int, world: int, step: int) -> list[int]:
    return sorted(
        sample.index
        for rank in range(world)
        for micro in order(size, batch, accumulation, world, rank).micro_batches(step)
        for sample in micro
        if sample.weight
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_every_sample_comes_once_an_epoch(sizes: tuple[int, int, int, int]) -> None:
    whole = order(*sizes)
    for epoch in range(2):
        steps = range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch)
        counts = Counter(row for step in steps for row in rows_of(*sizes, step))
        assert counts == Counter(range(sizes[0]))
        assert sum(whole.samples_in(step) for step in steps) == sizes[0]
    assert whole.samples_before(2 * whole.steps_per_epoch) == 2 * sizes[0]


@pytest.mark.parametrize("size", [7, 16, 100, 129])
def test_an_update_has_the_same_samples_however_it_is_split(size: int) -> None:
    for step in range(3 * order(size, 16, 1, 1).steps_per_epoch):
        expected = rows_of(size, 16, 1, 1, step)
        for split in ((4, 4, 1), (8, 1, 2), (2, 2, 4), (1, 2, 8)):
            assert rows_of(size, *split, step) == expected


@pytest.mark.parametrize("sizes", SIZES)
def test_processes_keep_step_and_padding_has_weight_0(
    sizes: tuple[int, int, int, int],
) -> None:
    _, batch, _, world = sizes
    for step in range(order(*sizes).steps_per_epoch):
        shares = [list(order(*sizes, rank).micro_batches(step)) for rank in range(world)]
        assert {len(share) for share in shares} == {order(*sizes).micro_batches_in(step)}
        for share in shares:
            for micro in share:
                assert 1 <= len(micro) <= batch
                assert all(sample.weight == 1 for sample in micro) or [sample.weight for sample in micro] == [0]


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = ([s.index for m in order(50, 50, 1, 1).micro_batches(step) for s in m] for step in (0, 1))
    assert first != second
    other = [s.index for m in BatchPlan(ShuffledOrder(50, seed=4), 50, 1, 1, 0).micro_batches(0) for s in m]
    assert first != other


def test_partners_are_pairs_of_neighbours_independent_of_the_split() -> None:
    def partners(batch: int, world: int) -> dict[int, int]:
        return {
            sample.index: sample.partner
            for rank in range(world)
            for step in range(order(20, batch, 1, world).steps_per_epoch)
            for micro in order(20, batch, 1, world, rank).micro_batches(step)
            for sample in micro
        }

    one = partners(20, 1)
    assert one == partners(3, 2) == partners(1, 4)
    assert all(one[one[row]] == row and one[row] != row for row in one)


@pytest.mark.parametrize("size", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_evaluation_covers_every_row_once_in_equally_many_batches(size: int, world: int, batch: int) -> None:
    shares = [evaluation_batches(size, batch, world, rank) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for part in share for row in part]
    assert sorted(row for row in rows if row != PADDING_INDEX) == list(range(size))
    assert all(1 <= len(part) <= batch for share in shares for part in share)


@pytest.mark.parametrize("sizes", SIZES)
def test_padding_appears_only_where_a_process_has_nothing(sizes: tuple[int, int, int, int]) -> None:
    """A micro-batch of fewer samples than processes has a padding sample for each process too many."""
    _, batch, _, world = sizes
    for step in range(order(*sizes).steps_per_epoch):
        shares = [list(order(*sizes, rank).micro_batches(step)) for rank in range(world)]
        left = order(*sizes).samples_in(step)
        for number in range(len(shares[0])):
            together = [sample for share in shares for sample in share[number]]
            expected = min(batch * world, left)
            left -= expected
            assert sum(sample.weight for sample in together) == expected
            assert len(together) == max(expected, world)
        assert left == 0


@pytest.mark.parametrize("first", range(8))
def test_a_sampler_may_start_at_any_update_of_any_epoch(first: int) -> None:
    for rank in range(2):
        whole = order(27, 4, 1, 2, rank)
        expected = [micro for step in range(first, 8) for micro in whole.micro_batches(step)]
        found = list(MicroBatches(whole, first, 8))
        assert found == expected
        assert len(MicroBatches(whole, first, 8)) == len(found)


@pytest.mark.parametrize("sizes", SIZES)
def test_samples_are_counted_as_they_come(sizes: tuple[int, int, int, int]) -> None:
    seen = 0
    for step in range(2 * order(*sizes).steps_per_epoch):
        assert order(*sizes).samples_before(step) == seen
        seen += len(rows_of(*sizes, step))
