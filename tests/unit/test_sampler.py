"""Order of the data over epochs and ranks."""

from __future__ import annotations

from itertools import chain

import numpy as np

from graft.data.order import BatchOrder


def order(**kwargs: object) -> list[list[int]]:
    return [batch.tolist() for batch in BatchOrder(**kwargs)]  # type: ignore[arg-type]


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[list[int]]:
        return order(size=10, batch_size=3, shuffle=True, seed=seed, epoch=lambda: number)

    assert sorted(chain(*epoch(0, 0))) == list(range(10))
    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_the_epoch_is_asked_for_when_iteration_starts() -> None:
    """Loaders outlive epochs: an order drawn at construction would repeat for ever."""
    now = [0]
    sampler = BatchOrder(100, 10, shuffle=True, epoch=lambda: now[0])
    first = np.concatenate(list(sampler))
    now[0] = 1
    assert not np.array_equal(np.concatenate(list(sampler)), first)


def test_batch_i_of_two_ranks_is_batch_i_of_one_process_with_twice_the_size() -> None:
    kwargs = {"size": 25, "shuffle": True, "seed": 4, "drop_last": True}
    single = order(batch_size=8, **kwargs)
    ranks = [order(batch_size=4, rank=r, world_size=2, **kwargs) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(b) for b in single]


def test_training_ranks_get_equally_many_batches() -> None:
    lengths = {
        len(order(size=23, batch_size=4, shuffle=True, rank=r, world_size=3)) for r in range(3)
    }
    assert lengths == {2}


def test_evaluation_sees_each_example_once_over_uneven_ranks() -> None:
    """A padded sampler would repeat examples, and count them twice in the accuracy."""
    ranks = [order(size=11, batch_size=2, rank=r, world_size=3) for r in range(3)]
    assert sorted(chain(*(chain(*rank) for rank in ranks))) == list(range(11))


def test_length_is_what_iteration_yields() -> None:
    for size in (1, 7, 8, 9):
        for drop_last in (False, True):
            sampler = BatchOrder(size, 4, shuffle=True, drop_last=drop_last)
            steps = size // 4 if drop_last else {1: 1, 7: 2, 8: 2, 9: 2}[size]  # 9: 4 and 5
            assert len(sampler) == len(list(sampler)) == steps


def test_an_epoch_longer_than_the_data_goes_through_it_again() -> None:
    """Each image as often as any other, and a repeat is another draw to augmentation."""
    (long,) = order(size=4, batch_size=12, shuffle=True, epoch_size=12)
    assert sorted(long) == list(range(12))
    for i in range(3):
        assert sorted(position % 4 for position in long[4 * i : 4 * i + 4]) == [0, 1, 2, 3]


def test_epochs_shorter_than_the_data_are_parts_of_it() -> None:
    """Ten images in epochs of four: the third finishes the first round and starts the second."""
    epochs = [
        list(chain(*order(size=10, batch_size=2, shuffle=True, epoch_size=4, epoch=lambda e=e: e)))
        for e in range(5)
    ]
    row = [position % 10 for position in chain(*epochs)]
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10] != row[10:]
    assert {len(epoch) for epoch in epochs} == {4}
    (whole,) = order(size=10, batch_size=10, shuffle=True)
    assert row[:10] == whole  # the same rounds, cut elsewhere


def test_two_ranks_share_a_longer_epoch_as_one_process_does() -> None:
    kwargs = {"size": 5, "shuffle": True, "epoch_size": 16, "drop_last": True}
    single = order(batch_size=8, **kwargs)
    ranks = [order(batch_size=4, rank=r, world_size=2, **kwargs) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(b) for b in single]


def test_an_interrupted_epoch_goes_on_where_it_was_when_iteration_starts() -> None:
    """Asked at `iter`, not at the first batch: a loader's workers fetch ahead of it."""
    now = [0]
    sampler = BatchOrder(20, 4, shuffle=True, first=lambda: now[0])
    whole = [batch.tolist() for batch in sampler]
    now[0] = 3
    rest = iter(sampler)
    now[0] = 0
    assert [batch.tolist() for batch in rest] == whole[3:]
    assert len(sampler) == 5
