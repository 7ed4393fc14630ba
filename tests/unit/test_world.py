"""world: torchrun's variables become ranks; anything half set is refused with what to do."""

import dataclasses

import pytest

from agnews_dist.errors import UserError
from agnews_dist.world import World, detect_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_without_a_launcher_there_is_one_rank() -> None:
    assert detect_world({}) == World() == World(rank=0, num_ranks=1, local_rank=0, ranks_per_node=1)
    assert World().is_main
    # Empty is unset; a Slurm step of one task is one rank too.
    assert detect_world({"RANK": "", "SLURM_STEP_NUM_TASKS": "1"}) == World()


def test_torchruns_variables() -> None:
    world = detect_world({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"})
    assert world == World(rank=5, num_ranks=8, local_rank=1, ranks_per_node=4)
    assert world.label == "[rank 5/8]"
    assert not world.is_main
    assert detect_world({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).is_main


def test_a_world_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_a_missing_variable_is_named(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=rf"but {name} missing: .* Start with torchrun, or unset"):
        detect_world(environ)


@pytest.mark.parametrize("value", ["x", "-1", "1.5", " 1"])
@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{name}='{value}' is no count: .* Start the job with torchrun\."):
        detect_world({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "8"), ("WORLD_SIZE", "5"), ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"), ("LOCAL_WORLD_SIZE", "0")],
)
def test_a_rank_outside_the_world_is_named(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"\b{name}={value}\b.* do not match: .* Start the job with torchrun"):
        detect_world({**TORCHRUN, name: value})


def test_srun_without_torchrun_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"srun started 4 tasks without torchrun: .* 'srun --ntasks-per-node=1 torchrun"
    ):
        detect_world({"SLURM_STEP_NUM_TASKS": "4"})
