"""Launchers' variables: complete ones become a `World`, incomplete or contradictory ones are refused."""

import dataclasses

import pytest

from agnews_dist.distributed.world import World, check_interfaces, detect_world
from agnews_dist.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
# The deepspeed launcher's variables of the same rank.
DEEPSPEED = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
# `accelerate launch --cpu --num_processes 2` sets these for the one process that it starts.
ACCELERATE_ON_A_CPU = {
    **{"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


def test_detect_world_without_a_launcher_is_one_rank() -> None:
    assert detect_world({}) == World() == World(rank=0, num_ranks=1, local_rank=0, ranks_per_node=1)
    assert World().is_main
    # An empty variable counts as unset.
    assert detect_world({"RANK": "", "LOCAL_WORLD_SIZE": ""}) == World()


def test_detect_world_reads_torchruns_variables() -> None:
    world = detect_world({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"})
    assert world == World(rank=5, num_ranks=8, local_rank=1, ranks_per_node=4)
    assert world.label == "[rank 5/8]"
    assert not world.is_main
    assert detect_world({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).is_main


def test_world_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_detect_world_names_a_missing_variable(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=rf"but {name} missing: .* Start with torchrun, or unset"):
        detect_world(environ)


@pytest.mark.parametrize("value", ["x", "-1", "1.5", " 1"])
@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_detect_world_names_a_value_that_is_not_a_number(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{name}='{value}': must be a whole number\. Start the job with torchrun\."):
        detect_world({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "8"), ("WORLD_SIZE", "5"), ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"), ("LOCAL_WORLD_SIZE", "0")],
)
def test_detect_world_names_a_rank_outside_the_world(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"\b{name}={value}\b.*: these do not match\. Start the job with torchrun"):
        detect_world({**TORCHRUN, name: value})


def test_detect_world_runs_one_process_in_the_shell_of_an_interactive_srun() -> None:
    shell = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "4242", "SLURM_PROCID": "0"}
    assert detect_world(shell) == World()
    with pytest.raises(UserError, match="srun started 8 tasks"):
        detect_world({**shell, "SLURM_PROCID": "1"})


def test_check_interfaces_names_one_that_does_not_exist() -> None:
    world = World(num_ranks=2, ranks_per_node=2)
    check_interfaces({"GLOO_SOCKET_IFNAME": "lo"}, world)
    check_interfaces({"GLOO_SOCKET_IFNAME": "nosuch0"}, World())
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME nosuch0: .* has no such network interface, only .*lo.*Correct or"):
        check_interfaces({"GLOO_SOCKET_IFNAME": "lo,nosuch0"}, world)


@pytest.mark.parametrize(
    ("name", "starter", "remedy"),
    [
        ("SLURM_STEP_NUM_TASKS", "srun", "srun --ntasks-per-node=1 torchrun"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun", "mpirun --npernode 1 torchrun"),
        ("PMI_SIZE", "mpirun", "mpirun -ppn 1 torchrun"),
        ("MV2_COMM_WORLD_SIZE", "mpirun", "mpirun -ppn 1 torchrun"),
    ],
)
def test_detect_world_refuses_several_tasks_without_torchrun(name: str, starter: str, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"{starter} started 4 tasks without torchrun: .* '{remedy} "):
        detect_world({name: "4"})
    # One task is one rank; with a launcher's ranks the count does not matter.
    assert detect_world({name: "1"}) == World()
    assert detect_world({**TORCHRUN, name: "4"}).rank == 5


def test_detect_world_reads_the_deepspeed_launchers_variables() -> None:
    assert detect_world(DEEPSPEED) == detect_world(TORCHRUN)
    # That launcher passes on its own environment, which may hold an equal value.
    assert detect_world({**DEEPSPEED, "LOCAL_WORLD_SIZE": "4"}) == detect_world(TORCHRUN)
    # Alone the variable may be another program's.
    assert detect_world({"LOCAL_SIZE": "4"}) == World()


def test_detect_world_refuses_contradictory_launchers() -> None:
    with pytest.raises(UserError, match=r"LOCAL_WORLD_SIZE=2 .* and LOCAL_SIZE=4 .* Unset both before"):
        detect_world({**DEEPSPEED, "LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_detect_world_names_a_missing_variable_of_deepspeed(name: str) -> None:
    environ = {key: value for key, value in DEEPSPEED.items() if key != name}
    with pytest.raises(UserError, match=rf"but {name} missing: .* Start with torchrun, or unset"):
        detect_world(environ)


def test_detect_world_refuses_accelerates_silent_single_process() -> None:
    with pytest.raises(UserError, match=r"started one process, with MASTER_PORT=29500: .* Use launch/accelerate\.sh, or unset"):
        detect_world(ACCELERATE_ON_A_CPU)
    # Accepted: with ranks; without a port, for one process; a port without accelerate's variable.
    assert detect_world({**ACCELERATE_ON_A_CPU, **TORCHRUN}) == detect_world(TORCHRUN)
    for name in ("MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        assert detect_world({key: value for key, value in ACCELERATE_ON_A_CPU.items() if key != name}) == World()
