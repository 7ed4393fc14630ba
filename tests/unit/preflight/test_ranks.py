"""Comparisons of ranks: versions, world size, devices and cores."""

import pytest

from agnews_dist.distributed.node_resources import Cores
from agnews_dist.distributed.world import World
from agnews_dist.preflight.machine import RankReport
from agnews_dist.preflight.ranks import check_world, compare_ranks, judge_cores, judge_devices

GPU = {"device": "cuda", "precision": "bf16", "GPU": "H100"}
WORLD, HOSTS = World(num_ranks=4, ranks_per_node=2), ["a", "a", "b", "b"]


def rank_on(host: str, *cores: int, threads: int, count: int | None = None) -> RankReport:
    """Return a rank's report; `count`: cores that a CPU-time limit leaves, by default all."""
    allowed = Cores(cores, len(cores) if count is None else count)
    return RankReport(host=host, device=GPU, cores=allowed, threads=threads, versions={}, settings={}, findings=[], memory={})


def test_compare_ranks_lists_differences_with_both_values():
    same = {"torch": "2.13.0", "numpy": "2.4"}
    assert compare_ranks("versions", [same, same], "...").verdict == "ok"
    finding = compare_ranks("versions", [same, {**same, "torch": "2.11.0"}, {"numpy": "2.4"}], "Start again")
    assert (finding.verdict, finding.ranks, finding.remedy) == ("fail", (1, 2), "Start again")
    assert finding.found == "torch 2.13.0 on rank 0, 2.11.0, absent on ranks 1-2"


def test_compare_ranks_lists_names_that_rank_0_lacks():
    assert compare_ranks("versions", [{}, {"a": 1}], "...").found == "a absent on rank 0, 1 on rank 1"


def test_check_world_compares_with_the_expected_ranks():
    assert check_world(4, WORLD, HOSTS, {}).verdict == "ok"
    assert check_world(None, WORLD, HOSTS, {}).found == "4 rank(s) on 2 node(s): a, b"
    wrong = check_world(16, WORLD, HOSTS, {})
    assert (wrong.verdict, wrong.found) == ("fail", "4 rank(s) on 2 node(s): a, b, 16 were expected")


def test_check_world_compares_with_the_nodes_of_the_slurm_step():
    step = {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_ID": "0"}
    finding = check_world(None, WORLD, HOSTS, step)
    assert (finding.verdict, finding.found) == ("fail", "4 rank(s) on 2 node(s): a, b; Slurm gave the step 3 node(s)")
    assert check_world(None, WORLD, HOSTS, {**step, "SLURM_STEP_NUM_NODES": "2"}).verdict == "ok"


def test_judge_devices_fails_for_different_types_and_warns_for_different_gpus():
    cpu = {"device": "cpu", "precision": "fp32"}
    finding = judge_devices([GPU, GPU, cpu, {"device": "cuda", "precision": "fp32", "GPU": "V100"}])
    assert (finding.verdict, finding.ranks) == ("fail", (2, 3))
    assert finding.found == "device cuda on rank 0, cpu on rank 2; precision bf16 on rank 0, fp32 on ranks 2-3"
    assert judge_devices([GPU, GPU]).verdict == judge_devices([cpu]).verdict == "ok"
    slower = judge_devices([GPU, {**GPU, "GPU": "A100"}])
    assert (slower.verdict, slower.found, slower.ranks) == ("warn", "GPU H100 on rank 0, A100 on rank 1", (1,))


@pytest.mark.parametrize(
    "facts",
    [
        [rank_on("a", 0, 1, threads=2), rank_on("a", 2, 3, threads=2)],
        [rank_on("a", 0, 1, 2, 3, threads=2), rank_on("a", 0, 1, 2, 3, threads=2)],
        # Two nodes number their cores alike.
        [rank_on("a", 0, 1, threads=2), rank_on("b", 0, 1, threads=2)],
    ],
)
def test_judge_cores_accepts_a_core_per_thread(facts):
    finding = judge_cores(facts)
    assert (finding.verdict, finding.ranks) == ("ok", ())
    assert finding.found == "2 thread(s) per rank, a core for each"


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        # Some clusters give one core to a job that asks for GPUs alone.
        ([rank_on("a", 0, threads=1)] * 8, "8 rank(s) on a have 8 thread(s) and 1 core(s)"),
        # A limit of CPU time, not of cores.
        ([rank_on("a", 0, 1, 2, 3, threads=2, count=2)] * 2, "2 rank(s) on a have 4 thread(s) and 2 core(s)"),
        # A rank bound to one core, with two threads; the other node is fine.
        (
            [rank_on("b", 0, 1, threads=2), rank_on("a", 0, threads=2), rank_on("a", 1, 2, 3, threads=1)],
            "2 rank(s) on a have 3 thread(s) and 4 core(s)",
        ),
    ],
)
def test_judge_cores_names_nodes_with_too_few_cores(facts, found):
    finding = judge_cores(facts)
    assert (finding.verdict, finding.found) == ("warn", found)
    assert finding.ranks == tuple(rank for rank, own in enumerate(facts) if own.host == "a")
    # Fewer than one thread is not possible.
    assert ("set OMP_NUM_THREADS=1" in finding.remedy) is (max(own.threads for own in facts) > 1)
