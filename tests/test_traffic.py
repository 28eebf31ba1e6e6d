"""What a step sends: collectives are counted as torch makes them, volumes follow from a ring."""

import pytest
import torch
import torch.distributed as dist

from labkit.scale.traffic import CountedCollectives, sent_bytes


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ring_sends_an_all_reduce_twice():
    # On 2 ranks half of a tensor leaves each; on 4 ranks three quarters.
    assert sent_bytes({"all-reduce": 800}, devices=2) == 800
    assert sent_bytes({"all-gather": 800, "reduce-scatter": 400}, devices=4) == 900
    assert sent_bytes({"all-reduce": 800}, devices=1) == 0


def test_collectives_of_real_numbers_are_counted_and_made(one_rank):
    weights, tokens = torch.ones(3), torch.ones(5, dtype=torch.long)
    whole, piece = torch.zeros(8), torch.ones(8)
    with CountedCollectives() as counted:
        dist.all_reduce(weights)
        dist.all_reduce(tokens)  # a count, not a gradient
        dist.all_gather_single(whole, piece)
        dist.broadcast(weights, src=0)  # no part of a step
    assert counted.calls == {"all-reduce": 1, "all-gather": 1}
    assert counted.bytes == {"all-reduce": 12, "all-gather": 32}
    assert whole.tolist() == [1.0] * 8
