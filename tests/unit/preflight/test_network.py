"""Network checks: pairs of ranks, slow ranks and wrong clocks."""

from itertools import combinations

import pytest

from agnews_dist.preflight.network import Work, choose_peers, judge_clocks, judge_work

HOSTS = ["a", "a", "b", "b"]


def works(*gigaflops: float, share: float | None = 1.0) -> list[Work]:
    return [Work(rate * 1e9, share) for rate in gigaflops]


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_choose_peers_lets_every_two_ranks_meet_once(num_ranks):
    met = []
    for turn in range(num_ranks):
        peers = choose_peers(turn, num_ranks)
        assert all(peers[peer] == rank for rank, peer in enumerate(peers))
        met += [(rank, peer) for rank, peer in enumerate(peers) if rank < peer]
    assert sorted(met) == list(combinations(range(num_ranks), 2))


def test_judge_work_names_the_slow_rank_with_its_cores():
    assert judge_work(works(1.0, 1.1, 0.9, 1.0), HOSTS, [4] * 4).found == "1 GFLOP/s per rank"
    finding = judge_work(works(8, 8, 8, 2), HOSTS, [4, 4, 4, 1])
    assert (finding.verdict, finding.ranks) == ("warn", (3,))
    assert finding.found == "rank 3 on b computes 4.0 times as slowly as others, has 1 core(s) instead of 4"
    assert judge_work(works(2, 8), ["a", "b"], [4, 4]).ranks == (0,)
    # One fast rank does not make the others slow.
    assert judge_work(works(2, 2, 2, 8), HOSTS, [4] * 4).verdict == "ok"


def test_judge_work_names_ranks_without_cpu_time_even_if_all_are_slow():
    finding = judge_work([Work(2e9, 0.25), Work(2e9, 0.3)], ["a", "b"], [4, 4])
    assert (finding.verdict, finding.ranks) == ("warn", (0, 1))
    assert finding.found == "rank 0 on a gets 25% of the time on its core; rank 1 on b gets 30% of the time on its core"
    finding = judge_work([Work(8e9, 0.97), Work(2e9, 0.25)], ["a", "b"], [4, 4])
    assert finding.found == "rank 1 on b computes 4.0 times as slowly as others, gets 25% of the time on its core"
    # On a GPU the main thread only waits: its CPU time says nothing.
    assert judge_work(works(8, 8, share=None), ["a", "b"], [4, 4]).verdict == "ok"


@pytest.mark.parametrize(
    ("offsets", "verdict", "ranks"),
    [
        ([0.0, 0.2, -0.3], "ok", ()),
        ([0.0, 0.0, 4.0], "warn", (2,)),
        ([0.0, 0.0, -3600.0], "fail", (2,)),
        # Rank 0's clock, the reference, is the wrong one.
        ([0.0, 3600.0, 3600.0], "fail", (0,)),
        ([0.0, 20.0], "fail", (1,)),
    ],
)
def test_judge_clocks_names_the_clock_unlike_the_majority(offsets, verdict, ranks):
    finding = judge_clocks(offsets, ["a", "b", "c"])
    assert (finding.verdict, finding.ranks) == (verdict, ranks)
