"""Files for clusters: the TrainJob, SkyPilot's task and the Dockerfile have known fields and refer to what exists."""

import copy
from typing import Any

import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from support.processes import REPOSITORY

# SkyPilot 0.14, sky/utils/schemas.py: the properties of a task, its resources and its mounts.
TASK = {"name", "workdir", "num_nodes", "resources", "file_mounts", "volumes", "setup", "run", "envs", "secrets", "config"}
RESOURCES = {"accelerators", "cpus", "memory", "use_spot", "job_recovery", "image_id", "infra", "disk_size", "network_tier"}
MOUNT = {"name", "source", "store", "persistent", "mode"}
TRAINJOB = REPOSITORY / "launch" / "trainjob.yaml"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "launch" / name).read_text(encoding="utf-8"))


def is_train_job(manifest: dict[str, Any]) -> bool:
    """Return whether the API's models know every field: they drop the others."""
    return TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest


def test_trainjob_has_fields_of_the_api() -> None:
    manifest = read("trainjob.yaml")
    assert is_train_job(manifest)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicas"] = 2
    assert not is_train_job(wrong)


def test_trainjob_saves_to_its_claim_when_it_is_stopped() -> None:
    spec = read("trainjob.yaml")["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    [patch] = spec["runtimePatches"]
    [job] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    # Names of the runtime torch-distributed.
    assert (job["name"], container["name"]) == ("node", "node")
    assert pod["terminationGracePeriodSeconds"] > 30
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    home = next(line for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if line.startswith("WORKDIR /w"))
    assert "persistentVolumeClaim" in mounts[home.split()[1]]


def test_sky_task_has_known_fields() -> None:
    task = read("sky.yaml")
    assert set(task) <= TASK
    assert set(task["resources"]) <= RESOURCES
    [(path, mount)] = task["file_mounts"].items()
    assert set(mount) <= MOUNT
    assert mount["mode"] == "MOUNT_CACHED"
    assert f"--run.dir {path} " in task["run"]
    assert (REPOSITORY / task["setup"].split()[1]).is_file()
