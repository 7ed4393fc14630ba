"""The choice of a place: every rule in a table, and reasons with the numbers."""

from dataclasses import replace
from typing import Any

import pytest

from agnews_dist.features.placement import Choice, Resources, choose
from agnews_dist.storage.capacity import gigabytes

GB = 10**9
NEEDED = 6 * GB
PLENTY = Resources(
    num_ranks=1,
    ranks_per_node=1,
    has_gpu=False,
    device_bytes=100 * GB,
    host_bytes=100 * GB,
    shared_bytes=100 * GB,
    disk_bytes=100 * GB,
    disk_limit_bytes=100 * GB,
)
SCARCE = replace(PLENTY, device_bytes=GB, host_bytes=GB, shared_bytes=GB, disk_bytes=GB)
WITH_GPU = replace(PLENTY, has_gpu=True)
TWO_GPUS = replace(PLENTY, num_ranks=2, ranks_per_node=2, has_gpu=True, device_bytes=GB)
EIGHT_GPUS = replace(PLENTY, num_ranks=8, ranks_per_node=8, has_gpu=True)


def decide(requested: Any = "auto", resources: Resources = PLENTY, num_bytes: int = NEEDED, **facts: Any) -> Choice:
    sizes = {"missing_bytes": num_bytes, "cached_share": 0.0}
    return choose(requested, num_bytes, resources, **{"num_epochs": 3, **sizes, **facts})


ON_DISK = {"missing_bytes": 0, "cached_share": 1.0}
NEARLY_ON_DISK = {"missing_bytes": GB // 10, "cached_share": 0.9899}
NO_HOST = "6.0 GB exceed 60% of the free host memory (600 MB)"
NO_DEVICE = "6.0 GB exceed 60% of the free device memory per rank (600 MB)"
NO_PART = NO_DEVICE.replace("6.0 GB", "3.0 GB")
NO_SHARED = "6.0 GB exceed 60% of the free shared memory of the node (600 MB)"
NO_DISK = "6.0 GB exceed 90% of the free disk space (900 MB)"
NO_LIMIT = "6.0 GB exceed engine.feature_cache_gigabytes (1.0 GB)"


@pytest.mark.parametrize(
    ("facts", "place", "reason"),
    [
        # auto: a GPU's memory first, or without one the disk; features that do not fit go to the next place.
        ({"resources": WITH_GPU}, "device", "6.0 GB, fits"),
        ({}, "disk", "6.0 GB, fits"),
        ({"resources": replace(WITH_GPU, device_bytes=GB)}, "host", f"6.0 GB, {NO_DEVICE}"),
        ({"resources": replace(PLENTY, disk_bytes=GB)}, "host", f"6.0 GB, {NO_DISK}"),
        ({"resources": replace(WITH_GPU, device_bytes=GB, host_bytes=GB)}, "disk", f"6.0 GB, {NO_DEVICE}; {NO_HOST}"),
        ({"resources": SCARCE}, "off", f"computed at every use: 6.0 GB fit nowhere ({NO_DISK}; {NO_HOST})"),
        # Complete files come first, even for one epoch and on a full disk.
        ({**ON_DISK, "resources": WITH_GPU}, "disk", "6.0 GB, cached by an earlier run"),
        ({**ON_DISK, "num_epochs": 1, "resources": SCARCE}, "disk", "6.0 GB, cached by an earlier run"),
        ({**ON_DISK, "requested": "disk", "resources": SCARCE}, "disk", "6.0 GB, cached by an earlier run"),
        ({**ON_DISK, "failed": frozenset({"disk"})}, "host", "6.0 GB, disk failed"),
        # Features that are there in part: the disk needs space for the others only.
        ({**NEARLY_ON_DISK, "resources": SCARCE}, "disk", "6.0 GB, 98% cached by earlier runs, fits"),
        ({**NEARLY_ON_DISK, "resources": WITH_GPU}, "device", "6.0 GB, 98% cached by earlier runs, fits"),
        ({**NEARLY_ON_DISK, "num_epochs": 1}, "disk", "6.0 GB, 98% cached by earlier runs, fits"),
        ({**NEARLY_ON_DISK, "cached_share": 0.4, "num_epochs": 1}, "off", "computed at every use, which is once in one epoch"),
        # With one epoch, auto caches nothing; another requested place is taken.
        ({"num_epochs": 1}, "off", "computed at every use, which is once in one epoch"),
        ({"num_epochs": 1, "requested": "disk"}, "disk", "6.0 GB, as requested"),
        ({"num_epochs": 2}, "disk", "6.0 GB, fits"),
        # Without any epoch only complete files are of use.
        ({"num_epochs": 0, "requested": "host"}, "off", "computed at their use: nothing is trained on them"),
        ({"num_epochs": 0, "requested": "host", **ON_DISK}, "off", "computed at their use: nothing is trained on them"),
        ({"num_epochs": 0, **NEARLY_ON_DISK}, "off", "computed at their use: nothing is trained on them"),
        ({"num_epochs": 0, **ON_DISK}, "disk", "6.0 GB, cached by an earlier run"),
        # A requested place comes before a GPU and before complete files.
        ({"requested": "device"}, "device", "6.0 GB, as requested"),
        ({"requested": "host", **ON_DISK, "resources": WITH_GPU}, "host", "6.0 GB, as requested"),
        ({"requested": "disk", "resources": WITH_GPU}, "disk", "6.0 GB, as requested"),
        # Several ranks of a node need shared memory.
        ({"resources": replace(TWO_GPUS, shared_bytes=GB)}, "disk", f"6.0 GB, {NO_PART}; {NO_SHARED}"),
        ({"resources": TWO_GPUS}, "host", f"6.0 GB, {NO_PART}"),
        ({"resources": replace(TWO_GPUS, ranks_per_node=1, shared_bytes=0)}, "host", f"6.0 GB, {NO_PART}"),
        ({"resources": replace(TWO_GPUS, host_bytes=GB)}, "disk", f"6.0 GB, {NO_PART}; {NO_HOST}"),
        # A device holds its rank's part, the host all parts.
        ({"resources": replace(EIGHT_GPUS, device_bytes=2 * GB)}, "device", "6.0 GB, fits"),
        ({"resources": replace(EIGHT_GPUS, device_bytes=GB)}, "host", f"6.0 GB, {NO_DEVICE.replace('6.0 GB', '750 MB')}"),
        # A place that failed is not tried again.
        ({"failed": frozenset({"disk"})}, "host", "6.0 GB, disk failed"),
        (
            {"failed": frozenset({"host", "disk"})},
            "off",
            "computed at every use: 6.0 GB fit nowhere (disk failed; host failed)",
        ),
    ],
)
def test_choose_gives_place_and_reason(facts, place, reason):
    found = decide(**facts)
    assert (found.place, found.reason) == (place, reason)
    assert found.refusal is None


@pytest.mark.parametrize(
    ("requested", "facts", "place", "misfits"),
    [
        ("device", {"resources": replace(WITH_GPU, device_bytes=GB)}, "host", NO_DEVICE),
        ("host", {"resources": replace(PLENTY, host_bytes=GB)}, "disk", NO_HOST),
        ("host", {"resources": replace(WITH_GPU, host_bytes=GB)}, "device", NO_HOST),
        ("disk", {"resources": replace(PLENTY, disk_bytes=GB)}, "host", NO_DISK),
        ("disk", {"resources": replace(PLENTY, disk_limit_bytes=GB)}, "host", NO_LIMIT),
        ("device", {"resources": replace(PLENTY, device_bytes=GB)}, "disk", NO_DEVICE),
        ("disk", {"failed": frozenset({"disk"})}, "host", "disk failed"),
        ("disk", {"resources": SCARCE}, "off", f"{NO_DISK}; {NO_HOST}"),
    ],
)
def test_choose_explains_why_it_refuses_the_requested_place(requested, facts, place, misfits):
    found = decide(requested, **facts)
    end = "computed at every use" if place == "off" else f"cached in {place}"
    assert (found.place, found.refusal) == (place, f"{misfits}. Features are {end}")
    # The control: with enough space the requested place is taken.
    assert decide(requested) == Choice(requested, "6.0 GB, as requested")


def test_choose_keeps_auto_off_a_disk_with_limit_0():
    found = decide(resources=replace(PLENTY, host_bytes=0, disk_limit_bytes=0))
    assert found.place == "off"
    assert "6.0 GB exceed engine.feature_cache_gigabytes (0 kB)" in found.reason
    assert decide(resources=replace(PLENTY, host_bytes=0, disk_limit_bytes=NEEDED)).place == "disk"


@pytest.mark.parametrize(
    ("requested", "field", "least"),
    [("device", "device_bytes", NEEDED / 0.6), ("host", "host_bytes", NEEDED / 0.6), ("disk", "disk_bytes", NEEDED / 0.9)],
)
def test_choose_takes_60_percent_of_memory_and_90_percent_of_the_disk(requested, field, least):
    assert decide(requested, replace(PLENTY, **{field: int(least) + 2})).place == requested
    assert decide(requested, replace(PLENTY, **{field: int(least) - 2})).place != requested


def test_choose_rounds_the_part_of_a_rank_up():
    resources = replace(SCARCE, num_ranks=2, device_bytes=10)
    assert decide("device", resources, num_bytes=12).place == "device"
    assert decide("device", resources, num_bytes=13).place == "disk"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 kB"), (1, "1 kB"), (999_999, "1000 kB"), (10**6, "1 MB"), (12_340 * GB, "12,340.0 GB")]
)
def test_gigabytes_formats_a_size(num_bytes, text):
    assert gigabytes(num_bytes) == text
