"""The order of streamed data: each sample once, the same in the same update for every split, read forward only."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from lora_dist.data.sampling.interleave import Interleave
from lora_dist.data.sampling.order import PADDING_INDEX, BatchPlan, MicroBatches, Sample

UNEVEN = (13, 2, 9, 1, 7)
DATA = [
    (UNEVEN, 4, 4),
    (UNEVEN, 1, 2),
    (UNEVEN, 5, 6),
    ((1, 1, 1, 1), 4, 2),
    ((40, 0, 3), 2, 8),
    ((100,) * 23, 8, 10),
    ((3, 50, 1, 2, 2, 8, 31), 5, 64),
]
SPLITS = [(16, 1, 1), (4, 4, 1), (8, 1, 2), (3, 1, 3), (2, 2, 4), (1, 1, 5)]


def lanes_of(data: tuple[Sequence[int], int, int], seed: int = 3) -> Interleave:
    sizes, count, block = data
    return Interleave(np.array(sizes), count, block, seed)


def orders(lanes: Interleave, batch: int, accumulation: int, world: int) -> list[BatchPlan]:
    return [BatchPlan(lanes, batch, accumulation, world, rank) for rank in range(world)]


def real(order: BatchPlan, step: int) -> list[Sample]:
    return [sample for micro in order.micro_batches(step) for sample in micro if sample.weight]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_comes_once_an_epoch(data: tuple[Sequence[int], int, int], split: tuple[int, int, int]) -> None:
    lanes = lanes_of(data)
    shares = orders(lanes, *split)
    for epoch in range(3):
        steps = range(epoch * shares[0].steps_per_epoch, (epoch + 1) * shares[0].steps_per_epoch)
        found = [sample for order in shares for step in steps for sample in real(order, step)]
        assert Counter(sample.index for sample in found) == Counter(range(sum(data[0])))
        assert sorted(sample.position for sample in found) == list(range(sum(data[0])))
        assert {sample.epoch for sample in found} == {epoch}


@pytest.mark.parametrize("data", DATA)
def test_an_update_has_the_same_samples_however_it_is_split(data: tuple[Sequence[int], int, int]) -> None:
    lanes = lanes_of(data)
    for step in range(2 * orders(lanes, 12, 1, 1)[0].steps_per_epoch):
        expected = sorted(real(orders(lanes, 12, 1, 1)[0], step))
        for split in ((4, 3, 1), (6, 1, 2), (3, 2, 2), (1, 4, 3), (3, 1, 4)):
            found = sorted(sample for order in orders(lanes, *split) for sample in real(order, step))
            assert [sample[:5] for sample in found] == [sample[:5] for sample in expected]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("split", SPLITS)
def test_processes_keep_step(data: tuple[Sequence[int], int, int], split: tuple[int, int, int]) -> None:
    """All make as many micro-batches, none of them empty or too large; one without samples gets a padding sample."""
    shares = orders(lanes_of(data), *split)
    for step in range(2 * shares[0].steps_per_epoch):
        made = [list(order.micro_batches(step)) for order in shares]
        assert {len(micros) for micros in made} == {shares[0].micro_batches_in(step)}
        for micros in made:
            for micro in micros:
                assert 1 <= len(micro) <= split[0]
                assert all(sample.weight == 1 for sample in micro) or [s[1:5] for s in micro] == [
                    (PADDING_INDEX, micro[0].position, PADDING_INDEX, 0.0)
                ]
        assert sum(len(real(order, step)) for order in shares) == shares[0].samples_in(step)


def test_no_more_micro_batches_than_asked_for_while_all_lanes_last() -> None:
    shares = orders(lanes_of(((100,) * 16, 8, 10)), 8, 2, 4)
    for step in range(shares[0].steps_per_epoch):
        assert shares[0].micro_batches_in(step) == 2
        assert all(len(micro) == 8 for order in shares for micro in order.micro_batches(step))


@pytest.mark.parametrize("data", DATA)
def test_a_shard_is_read_by_one_process_and_one_worker_from_front_to_back(data: tuple[Sequence[int], int, int]) -> None:
    lanes = lanes_of(data)
    shard_of = np.repeat(np.arange(len(data[0])), data[0])
    for world in range(1, min(3, data[1]) + 1):
        readers: dict[int, set[tuple[int, int | None]]] = {}
        for order in orders(lanes, 4, 1, world):
            blocks: dict[int | None, list[int]] = {}
            for step in range(order.steps_per_epoch):
                for sample in real(order, step):
                    readers.setdefault(int(shard_of[sample.index]), set()).add((order.rank, sample.lane))
                    (lane,), (block,) = lanes.layout(0).find(np.array([sample.index]))
                    assert (lane % world, lane // world) == (order.rank, sample.lane)
                    blocks.setdefault(sample.lane, []).append(int(block))
            assert all(numbers == sorted(numbers) for numbers in blocks.values())
        assert all(len(found) == 1 for found in readers.values())


@pytest.mark.parametrize("data", DATA)
def test_pieces_of_a_lane_are_its_blocks_one_after_another(data: tuple[Sequence[int], int, int]) -> None:
    lanes = lanes_of(data)
    layout = lanes.layout(1)
    first_rows = np.cumsum(data[0]) - data[0]
    for lane, length in enumerate(layout.lengths.tolist()):
        rows = [
            int(first_rows[shard]) + row for shard, start, stop in layout.pieces(lane, 0) for row in range(start, stop)
        ]
        assert len(rows) == length
        in_lanes, blocks = layout.find(np.array(rows))
        assert set(in_lanes.tolist()) == {lane}
        for block in sorted(set(blocks.tolist())):
            start, stop = layout.bounds(lane, block)
            assert 1 <= stop - start <= lanes.block
            assert np.flatnonzero(blocks == block).tolist() == list(range(start, stop))
            index = np.arange(start, stop)
            found, _ = layout.indices(np.full_like(index, lane), index)
            assert sorted(found.tolist()) == sorted(rows[start:stop])
            rest = [first_rows[shard] + begin for shard, begin, _ in layout.pieces(lane, start)]
            assert rest[0] == rows[start]


def test_lanes_are_of_about_the_same_length_and_the_longest_come_first() -> None:
    sizes = np.random.default_rng(0).integers(50, 150, 300)
    layout = Interleave(sizes, 16, 8, 0).layout(0)
    assert layout.lengths.tolist() == sorted(layout.lengths.tolist(), reverse=True)
    assert layout.lengths.max() - layout.lengths.min() <= sizes.max()


def test_the_lanes_that_last_are_spread_over_the_processes() -> None:
    layout = lanes_of(((100,) * 23, 8, 10)).layout(0)
    lane, _ = layout.locate(np.arange(1600, 2300))
    for world in (2, 4):
        shares = np.bincount(lane % world, minlength=world)
        assert shares.max() - shares.min() <= 100


def test_epochs_and_seeds_differ_and_nothing_else_matters() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        order = BatchPlan(lanes_of(DATA[5], seed), 50, 1, 1, 0)
        return [
            s.index for step in range(order.steps_per_epoch) for s in real(order, epoch * order.steps_per_epoch + step)
        ]

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(1, 1)
    assert rows(1, 0) != rows(2, 0)


def test_shuffling_reaches_across_shards_and_within_blocks() -> None:
    order = BatchPlan(lanes_of(((100,) * 32, 16, 20)), 64, 1, 1, 0)
    found = [sample.index for sample in real(order, 3)]
    assert len({row // 100 for row in found}) == 16, "each lane gives samples of its present shard"
    in_one = [row for row in found if row // 100 == found[0] // 100]
    assert in_one != sorted(in_one) or np.diff(in_one).max() > 1


@pytest.mark.parametrize("first", range(9))
def test_a_resumed_order_goes_on_with_the_same_samples(first: int) -> None:
    for rank in range(2):
        whole = list(MicroBatches(BatchPlan(lanes_of(DATA[0]), 4, 1, 2, rank), 0, 9))
        order = BatchPlan(lanes_of(DATA[0]), 4, 1, 2, rank)
        done = sum(order.micro_batches_in(step) for step in range(first))
        assert list(MicroBatches(order, first, 9)) == whole[done:]


@pytest.mark.parametrize("data", DATA)
def test_partners_are_pairs_of_one_block(data: tuple[Sequence[int], int, int]) -> None:
    lanes = lanes_of(data)
    order = BatchPlan(lanes, 7, 1, 1, 0)
    found = [sample for step in range(order.steps_per_epoch) for sample in real(order, step)]
    rows, partners = np.array([s.index for s in found]), np.array([s.partner for s in found])
    for one, other in zip(lanes.layout(0).find(rows), lanes.layout(0).find(partners), strict=True):
        assert np.array_equal(one, other)
    partner = dict(zip(rows.tolist(), partners.tolist(), strict=True))
    odd = [row for row in partner if partner[partner[row]] != row or partner[row] == row]
    _, blocks = np.unique(np.stack(lanes.layout(0).find(rows)), axis=1, return_counts=True)
    assert len(odd) == np.count_nonzero(blocks % 2), "only the last of an odd block is left over"


def test_many_samples_cost_no_loop_over_them() -> None:
    """A hundred million samples in a million shards."""
    lanes = Interleave(np.full(1_000_000, 100), 64, 64, 0)
    order = BatchPlan(lanes, 128, 1, 8, 7)
    assert order.steps_per_epoch == 97_657
    rows = [sample.index for sample in real(order, 90_000)]
    assert len(set(rows)) == 128
