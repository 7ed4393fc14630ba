"""The doctor's judgements on figures that are given: which are failures, whom they name, and how equal rows become one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from agnews_dist.distributed.node_resources import Cores
from agnews_dist.distributed.world import World, expand_counts, expand_nodes, ranks_of_srun
from agnews_dist.engine.memory import Shape
from agnews_dist.preflight import machine
from agnews_dist.preflight.disks import missing_parents, probe, remove_empty
from agnews_dist.preflight.findings import Finding, merged, rank_words, worst
from agnews_dist.preflight.machine import DeviceInfo
from agnews_dist.preflight.network import Work, judge_clocks, judge_pairs, judge_work, pairs_that_matter
from agnews_dist.preflight.ranks import Facts, check_world, differing, judge_cores, judge_devices
from agnews_dist.preflight.time_estimate import Job, Speed, expected_seconds

GPU = DeviceInfo("cuda", "bf16", "H100")
FINE = Finding(check="disk", verdict="ok", found="writable")
FULL = Finding(check="disk", verdict="fail", found="full", remedy="Free some space")
CORES = Finding(check="cores", verdict="warn", found="1 core", remedy="Ask for more")


def test_equal_findings_are_one_row_with_its_ranks():
    rows = merged([[FINE, CORES], [FULL], [FINE, CORES]])
    assert [(row.check, row.verdict, row.ranks) for row in rows] == [
        ("disk", "ok", (0, 2)),
        ("disk", "fail", (1,)),
        ("cores", "warn", (0, 2)),
    ]
    assert worst(rows) == "fail"
    assert worst([FINE, CORES]) == "warn"
    assert worst([FINE]) == worst([]) == "ok"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((), "all"),
        ((0, 1, 2, 3, 4, 5), "all"),
        ((3,), "rank 3"),
        ((0, 1, 2, 5), "ranks 0-2, 5"),
        ((5, 1), "ranks 1, 5"),
    ],
)
def test_ranks_in_words(ranks, words):
    assert rank_words(ranks, 6) == words


def test_what_differs_is_named_with_both_values():
    same = {"torch": "2.13.0", "numpy": "2.4"}
    assert differing("versions", [same, same], "...").verdict == "ok"
    found = differing("versions", [same, {**same, "torch": "2.11.0"}, {"numpy": "2.4"}], "Start again")
    assert (found.verdict, found.ranks, found.remedy) == ("fail", (1, 2), "Start again")
    assert found.found == "torch 2.13.0 on rank 0, 2.11.0, absent on ranks 1-2"
    # When all others have something that rank 0 has not.
    assert differing("versions", [{}, {"a": 1}], "...").found == "a absent on rank 0, 1 on rank 1"


def test_a_world_of_another_size():
    world, hosts = World(num_ranks=4, ranks_per_node=2), ["a", "a", "b", "b"]
    assert check_world(4, world, hosts, {}).verdict == "ok"
    assert check_world(None, world, hosts, {}).found == "4 rank(s) on 2 node(s): a, b"
    wrong = check_world(16, world, hosts, {})
    assert (wrong.verdict, wrong.found) == ("fail", "4 rank(s) on 2 node(s): a, b, where 16 were expected")
    step = {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_ID": "0"}
    found = check_world(None, world, hosts, step)
    assert (found.verdict, found.found.endswith("while Slurm gave the step 3 node(s)")) == ("fail", True)
    assert check_world(None, world, hosts, {**step, "SLURM_STEP_NUM_NODES": "2"}).verdict == "ok"
    # torchrun in the batch script itself, or a step that is to look at some of the nodes.
    job = {"SLURM_JOB_NUM_NODES": "3", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    found = check_world(None, world, hosts, job)
    assert (found.verdict, found.found.endswith("of 3 that Slurm gave the job: the others stand idle")) == (
        "warn",
        True,
    )
    assert check_world(None, world, hosts, {**job, "SLURM_JOB_NUM_NODES": "2"}).verdict == "ok"
    # Alone, in somebody's allocation, asked about a training that is not there.
    assert check_world(None, World(), ["a"], {"SLURM_JOB_NUM_NODES": "3"}).verdict == "ok"


@pytest.mark.parametrize(
    ("environ", "wanted", "shown"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}, "auto", "8"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "auto", "2"),
        # A broken driver on a machine of one's own.
        ({}, "auto", "3"),
        # Meant so.
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}, "cpu", None),
        ({"CUDA_VISIBLE_DEVICES": ""}, "auto", None),
        ({"SLURM_JOB_ID": "7"}, "auto", None),
    ],
)
def test_gpus_that_torch_does_not_see_are_told_unless_a_cpu_is_meant(tmp_path, monkeypatch, environ, wanted, shown):
    for name in ("nvidia0", "nvidia1", "nvidia15", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = machine._find_no_gpu(wanted, "fp32")
    assert found.verdict == ("ok" if shown is None else "fail")
    assert f"sees no GPU, though {shown} are here: the job would run on the CPU" in found.found or shown is None


def test_ranks_on_other_devices_cannot_train_together():
    cpu = DeviceInfo("cpu", "fp32", "")
    found = judge_devices([GPU, GPU, cpu, DeviceInfo("cuda", "fp32", "V100")])
    assert (found.verdict, found.ranks) == ("fail", (2, 3))
    assert found.found == "device cuda on rank 0, cpu on rank 2; precision bf16 on rank 0, fp32 on ranks 2-3"
    assert judge_devices([GPU, GPU]).verdict == judge_devices([cpu]).verdict == "ok"
    slower = judge_devices([GPU, DeviceInfo("cuda", "bf16", "A100")])
    assert (slower.verdict, slower.found, slower.ranks) == ("warn", "GPU H100 on rank 0, A100 on rank 1", (1,))


def test_nodes_that_probe_a_directory_at_once_do_not_take_it_from_each_other(tmp_path):
    """It is not there yet, and shall not be afterwards."""
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            place = tmp_path / str(number) / "runs"
            made = missing_parents(place)
            found = list(pool.map(lambda _, place=place: probe("run.dir", place, 1), range(8)))
            assert {row.verdict for row in found} == {"ok"}, found
            remove_empty(made)
            assert list(tmp_path.iterdir()) == []


def test_of_few_ranks_all_pairs_are_measured_and_of_many_the_ways_that_reductions_take():
    assert len(pairs_that_matter(["a"] * 8)) == 28
    assert pairs_that_matter(["a"]) == []
    pairs = pairs_that_matter([f"node{rank // 8}" for rank in range(32)])
    assert len(pairs) == 32 + 3
    assert {(0, 8), (0, 16), (0, 24), (7, 8), (0, 31)} <= set(pairs)
    assert all(a < b for a, b in pairs)


def test_a_slow_pair_is_compared_with_its_own_kind():
    hosts = ["a", "a", "b", "b"]
    rates = {(0, 1): 8e9, (2, 3): 8e9, (0, 2): 1e9, (0, 3): 1e9, (1, 2): 1e9, (1, 3): 1e9}
    found = judge_pairs(rates, hosts)
    assert (found.verdict, found.found) == (
        "ok",
        "within a node 8,000 to 8,000 MB/s, between nodes 1,000 to 1,000 MB/s",
    )
    found = judge_pairs({**rates, (1, 3): 2e8}, hosts)
    assert (found.verdict, found.found) == ("warn", "ranks 1 (a) and 3 (b): 200 MB/s, others 1,000")


def test_the_slow_rank_is_named_with_its_cores():
    hosts = ["a", "a", "b", "b"]
    assert judge_work(works(1.0, 1.1, 0.9, 1.0), hosts, [4] * 4).found == "1 GFLOP/s per rank"
    found = judge_work(works(8, 8, 8, 2), hosts, [4, 4, 4, 1])
    assert (found.verdict, found.ranks) == ("warn", (3,))
    assert found.found == "rank 3 on b computes 4.0 times as slowly as others, has 1 core(s) instead of 4"
    assert judge_work(works(2, 8), ["a", "b"], [4, 4]).ranks == (0,)
    # Three of four on slower machines: the one that is alone is not the fault.
    assert judge_work(works(2, 2, 2, 8), hosts, [4] * 4).verdict == "ok"


def test_ranks_that_are_not_let_run_are_named_though_all_are_as_slow():
    found = judge_work([Work(2e9, 0.25), Work(2e9, 0.3)], ["a", "b"], [4, 4])
    assert (found.verdict, found.ranks) == ("warn", (0, 1))
    assert found.found == "rank 0 on a gets 25% of the time on its core; rank 1 on b gets 30% of the time on its core"
    found = judge_work([Work(8e9, 0.97), Work(2e9, 0.25)], ["a", "b"], [4, 4])
    assert found.found == "rank 1 on b computes 4.0 times as slowly as others, gets 25% of the time on its core"
    # A rank that only waits for its GPU runs little, and is not slow for that.
    assert judge_work(works(8, 8, share=None), ["a", "b"], [4, 4]).verdict == "ok"


def works(*giga: float, share: float | None = 1.0) -> list[Work]:
    return [Work(rate * 1e9, share) for rate in giga]


def rank_on(host: str, *cores: int, threads: int, count: int | None = None) -> Facts:
    """`count`: how many of the cores a limit leaves; all."""
    return Facts(host, GPU, Cores(cores, len(cores) if count is None else count), threads, {}, {})


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        # Bound each to its own, or to none; two nodes with the same numbers.
        ([rank_on("a", 0, 1, threads=2), rank_on("a", 2, 3, threads=2)], "ok"),
        ([rank_on("a", 0, 1, 2, 3, threads=2), rank_on("a", 0, 1, 2, 3, threads=2)], "ok"),
        ([rank_on("a", 0, 1, threads=2), rank_on("b", 0, 1, threads=2)], "ok"),
        # What a cluster gives to a job that asks for GPUs alone.
        ([rank_on("a", 0, threads=1)] * 8, "8 rank(s) on a have 8 thread(s) and 1 core(s)"),
        # A limit of time, not of cores.
        (
            [rank_on("a", 0, 1, 2, 3, threads=2, count=2)] * 2,
            "2 rank(s) on a have 4 thread(s) and 2 core(s)",
        ),
        # Bound to one of two, with threads for both; another node is well.
        (
            [rank_on("b", 0, 1, threads=2), rank_on("a", 0, threads=2), rank_on("a", 1, 2, 3, threads=1)],
            "2 rank(s) on a have 3 thread(s) and 4 core(s)",
        ),
    ],
)
def test_threads_without_cores_are_told_by_node(facts, verdict):
    found = judge_cores(facts)
    if verdict == "ok":
        assert (found.verdict, found.ranks) == ("ok", ())
        assert found.found == "2 thread(s) per rank, a core for each"
        return
    assert (found.verdict, found.found) == ("warn", verdict)
    # One thread each is the least.
    assert ("set OMP_NUM_THREADS=1" in found.remedy) is (max(own.threads for own in facts) > 1)
    assert found.ranks == tuple(rank for rank, own in enumerate(facts) if own.host == "a")


@pytest.mark.parametrize(
    ("offsets", "verdict", "ranks"),
    [
        ([0.0, 0.2, -0.3], "ok", ()),
        ([0.0, 0.0, 4.0], "warn", (2,)),
        ([0.0, 0.0, -3600.0], "fail", (2,)),
        # The clock that rank 0 compares with is the wrong one itself.
        ([0.0, 3600.0, 3600.0], "fail", (0,)),
        ([0.0, 20.0], "fail", (1,)),
    ],
)
def test_a_wrong_clock_is_the_one_that_no_other_shares(offsets, verdict, ranks):
    found = judge_clocks(offsets, ["a", "b", "c"])
    assert (found.verdict, found.ranks) == (verdict, ranks)


JOB = Job(
    shape=Shape(num_blocks=12, width=768, inner=3072, num_heads=12, num_rows=50258, num_positions=1024),
    trainable_blocks=1,
    num_ranks=8,
    epochs=3,
    train_texts=114_000,
    scored_texts=13_600,
    max_length=512,
    global_batch_size=64,
    fast_path=True,
    keeps_features=True,
)
SPEED = Speed(flops=1e13, bytes_per_second=1e9)


def test_the_expected_time_moves_as_the_work_does():
    seconds = expected_seconds(JOB, SPEED)
    # GPT-2's block has 7,087,872 weights.
    frozen = 11 * 2 * 7_087_872 * 52 * 127_600 / (8 * 1e13 * 0.7)
    assert 10 + frozen < seconds < 1_000
    assert expected_seconds(replace(JOB, epochs=6), SPEED) > 1.5 * seconds
    assert expected_seconds(replace(JOB, keeps_features=False), SPEED) == pytest.approx(seconds + 2 * frozen)
    assert expected_seconds(replace(JOB, fast_path=False), SPEED) > seconds
    assert expected_seconds(replace(JOB, global_batch_size=32), SPEED) > 1.5 * seconds
    assert expected_seconds(JOB, replace(SPEED, bytes_per_second=1e7)) > 5 * seconds
    assert expected_seconds(JOB, replace(SPEED, bytes_per_second=None)) < seconds
    assert expected_seconds(replace(JOB, train_texts=0, scored_texts=0), SPEED) == 10


# What Slurm tells a task


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu1,login", ["gpu1", "login"]),
        ("gpu[01-03]", ["gpu01", "gpu02", "gpu03"]),
        ("gpu[9-11,15],login", ["gpu9", "gpu10", "gpu11", "gpu15", "login"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("a[1-2].site", ["a1.site", "a2.site"]),
    ],
)
def test_slurms_list_of_nodes(text, nodes):
    assert expand_nodes(text) == nodes


def test_slurms_counts_per_node():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]


TASK = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[7-9]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_srun_knows_its_place():
    assert ranks_of_srun(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu7",
        "MASTER_PORT": "20123",
    }
    assert ranks_of_srun({**TASK, "SLURM_NODEID": "2", "SLURM_LOCALID": "0"})["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize("environ", [{}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {**TASK, "RANK": "0"}])
def test_a_process_that_is_alone_or_launched_is_told_nothing(environ):
    assert ranks_of_srun(environ) == {}
