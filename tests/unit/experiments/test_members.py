"""Members of a sweep: what they share."""

import pytest

from agnews_dist.config.schema import Config, ModelConfig
from agnews_dist.errors import ConfigError
from agnews_dist.experiments.members import build_members, cut_waves, group_by_features


def test_members_have_all_seeds_of_every_combination() -> None:
    members = build_members(Config(), [{"optim.lr": 1e-4}, {"optim.lr": 1e-3}], (3, 5))
    assert [(each.index, each.setting, each.config.optim.lr, each.seed) for each in members] == [
        (0, 0, 1e-4, 3),
        (1, 0, 1e-4, 5),
        (2, 1, 1e-3, 3),
        (3, 1, 1e-3, 5),
    ]


def test_combinations_that_contradict_themselves_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        build_members(Config(), [{"data.max_length": 64}, {"data.max_length": 20_000}], (0, 1))
    assert str(caught.value).startswith("data.max_length=20000: batch.max_tokens_per_rank 16384 is below")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "num_groups"),
    [
        ("optim.lr", (1e-3, 1e-4), 1),
        ("run.seed", (0, 1), 1),
        ("batch.global_batch_size", (16, 32), 1),
        ("model.trainable_blocks", (1, 2), 2),
        ("data.max_length", (64, 128), 2),
        ("model.name", ("gpt2", "gpt2-medium"), 2),
    ],
)
def test_members_share_features_unless_a_setting_changes_them(key: str, values: tuple[object, ...], num_groups: int) -> None:
    assert len(group_by_features(build_members(Config(), [{key: value} for value in values], (0,)))) == num_groups


def test_members_with_drawn_weights_share_features_only_at_equal_seeds() -> None:
    config = Config(model=ModelConfig(init="random"))
    members = build_members(config, [{"optim.lr": 1e-3}, {"optim.lr": 1e-4}], (0, 1))
    assert [[each.seed for each in group] for group in group_by_features(members)] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("limit", "num_workers"), [(8, 1), (2, 1), (8, 4), (1, 3), (8, 100)])
def test_waves_have_every_member_once_and_equal_plans(limit: int, num_workers: int) -> None:
    members = build_members(
        Config(), [{"optim.lr": lr, "batch.global_batch_size": n} for lr in (1, 2, 3) for n in (8, 16)], (0, 1)
    )
    waves = cut_waves(members, limit=limit, num_workers=num_workers, first=10)
    assert [wave.number for wave in waves] == list(range(10, 10 + len(waves)))
    assert sorted(each.index for wave in waves for each in wave.members) == list(range(12))
    for wave in waves:
        assert len({(each.seed, each.config.batch.global_batch_size) for each in wave.members}) == 1
        assert len(wave.members) <= limit
    assert len(waves) >= min(num_workers, 12)
