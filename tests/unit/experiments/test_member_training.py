"""Members of one group of features: each uses its own value of every setting that may differ in the group."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support import small_run

from agnews_dist.api.named_settings import NamedSettings
from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import Config
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import ignore_event
from agnews_dist.experiments.feature_group import FeatureGroup, open_feature_group
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, train_in_lock_step
from agnews_dist.experiments.members import build_members
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer

MONITORS = Monitors(ignore_event, StageTimer(0.0), PreemptionHandler({}))
SMALL = {"data.limit_train": 48, "data.limit_validation": 16, "data.limit_test": 1, "optim.epochs": 2}
HEAD: Mapping[str, object] = {"model.trainable_blocks": 0}
FREE: list[tuple[str, object, Mapping[str, object]]] = [
    ("model.freeze_schedule", "2,1", {"model.trainable_blocks": 2}),
    ("model.dropout", 0.5, {}),
    ("model.standardize", True, HEAD),
    ("batch.global_batch_size", 8, {}),
    ("batch.global_token_budget", 300, {}),
    ("batch.bucket_window", 1, {}),
    ("optim.solver", "lbfgs", HEAD),
    ("optim.lr", 1e-3, {}),
    ("optim.epochs", 1, {}),
    ("optim.max_steps", 2, {}),
    ("optim.weight_decay", 10.0, {}),
    ("optim.layer_decay", 0.5, {}),
    ("optim.warmup_ratio", 0.5, {}),
    ("optim.schedule", "cosine", {}),
    ("optim.max_grad_norm", 0.01, {}),
    ("optim.label_smoothing", 0.3, {}),
    ("optim.class_weights", "1,2,3,4", {}),
    ("optim.r_drop", 1.0, {}),
    ("optim.average", "ema", {}),
    ("optim.average_start", 0.0, {"optim.average": "swa"}),
    ("optim.ema_decay", 0.1, {"optim.average": "ema"}),
    ("optim.evaluate_every", 1, {}),
    ("optim.patience", 1, {"optim.evaluate_every": 1, "optim.lr": 0.0}),
    ("run.seed", 1, {}),
]


def build(places: Mapping[str, object], **values: object) -> Config:
    named = NamedSettings()
    for key, value in {**small_run.settings(), **places, **SMALL, **values}.items():
        named.add(key, value, key)
    return named.build()


def train(group: FeatureGroup, config: Config) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the steps and the tensors of a member."""
    [member] = build_members(config, [{}], (config.run.seed,))
    training = MemberTraining(member, group, build_shared_loader(group, config), MONITORS)
    train_in_lock_step([training], after_step=lambda: None)
    return training.step, training.tensors()


def are_equal(left: tuple[int, dict[str, Any]], right: tuple[int, dict[str, Any]]) -> bool:
    names = {*left[1], *right[1]}
    return left[0] == right[0] and all(
        name in left[1] and name in right[1] and torch.equal(left[1][name], right[1][name]) for name in names
    )


def test_every_setting_that_may_differ_is_listed_here() -> None:
    assert [key for key, setting in all_settings().items() if setting.sweep == "free"] == [key for key, _, _ in FREE]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "run.dir": str(tmp_path_factory.mktemp("runs"))}


@pytest.mark.parametrize("context", [{}, HEAD, {"model.trainable_blocks": 2}], ids=["block", "head", "blocks"])
def test_member_uses_its_own_value(places: dict[str, object], context: Mapping[str, object]) -> None:
    """As in a group that is opened with this value alone; and the value has an effect."""
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    with ExitStack() as stack:
        shared = open_feature_group(build(places, **context), engine, MONITORS, stack, num_trainings=9)
        for key, value, more in FREE:
            if more.get("model.trainable_blocks", 1) != context.get("model.trainable_blocks", 1):
                continue
            config = build(places, **{**more, key: value})
            member = train(shared, config)
            assert not are_equal(member, train(shared, build(places, **more))), f"{key} has no effect"
            own = open_feature_group(config, engine, MONITORS, stack, num_trainings=1)
            assert are_equal(member, train(own, config)), f"{key} is not the member's own"
