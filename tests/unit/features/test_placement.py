"""Where features are kept: every rule of the decision in a table, and reasons that hold the numbers."""

from dataclasses import replace
from typing import Any

import pytest

from agnews_dist.features.placement import Choice, FreeSpace, choose
from agnews_dist.storage.capacity import gigabytes

GB = 10**9
NEED = 6 * GB
ROOMY = FreeSpace(device=100 * GB, host=100 * GB, shared=100 * GB, disk=100 * GB, disk_limit=100 * GB)
TIGHT = FreeSpace(device=GB, host=GB, shared=GB, disk=GB, disk_limit=100 * GB)


def decide(wanted: Any = "auto", room: FreeSpace = ROOMY, num_bytes: int = NEED, **facts: Any) -> Choice:
    usual = {"num_ranks": 1, "ranks_per_node": 1, "num_epochs": 3, "has_gpu": False, "is_on_disk": False}
    return choose(wanted, num_bytes, room, **{**usual, **facts})


NO_HOST = "6.0 GB exceed what may be taken of the free host memory (600 MB)"
NO_DEVICE = "6.0 GB exceed what may be taken of the free device memory per rank (600 MB)"
NO_DISK = "6.0 GB exceed what may be taken of the free disk space (900 MB)"


@pytest.mark.parametrize(
    ("facts", "place", "why"),
    [
        # auto: with a GPU its memory, without one the host's; what does not fit goes to the next place.
        ({"has_gpu": True}, "device", "6.0 GB, fits"),
        ({}, "host", "6.0 GB, fits"),
        ({"has_gpu": True, "room": replace(ROOMY, device=GB)}, "host", f"6.0 GB, {NO_DEVICE}"),
        ({"room": replace(ROOMY, host=GB)}, "disk", f"6.0 GB, {NO_HOST}"),
        ({"has_gpu": True, "room": replace(ROOMY, device=GB, host=GB)}, "disk", f"6.0 GB, {NO_DEVICE}; {NO_HOST}"),
        (
            {"room": TIGHT},
            "off",
            f"computed anew at every use: 6.0 GB fit nowhere ({NO_HOST}; {NO_DISK})",
        ),
        # What a former run left is there at once, even for one epoch, and however little room there is for more.
        ({"is_on_disk": True, "has_gpu": True}, "disk", "6.0 GB, kept by a former run"),
        ({"is_on_disk": True, "num_epochs": 1, "room": TIGHT}, "disk", "6.0 GB, kept by a former run"),
        ({"is_on_disk": True, "wanted": "disk", "room": TIGHT}, "disk", "6.0 GB, kept by a former run"),
        ({"is_on_disk": True, "failed": frozenset({"disk"})}, "host", "6.0 GB, fits"),
        # One epoch reads each once; an explicit wish is obeyed all the same.
        ({"num_epochs": 1}, "off", "computed as they are needed: one epoch needs each once"),
        ({"num_epochs": 1, "wanted": "disk"}, "disk", "6.0 GB, as asked"),
        ({"num_epochs": 2}, "host", "6.0 GB, fits"),
        # As asked, wherever a GPU or a former run would lead.
        ({"wanted": "off", "is_on_disk": True, "has_gpu": True}, "off", "as asked: computed anew at every use"),
        ({"wanted": "device"}, "device", "6.0 GB, as asked"),
        ({"wanted": "host", "has_gpu": True, "is_on_disk": True}, "host", "6.0 GB, as asked"),
        ({"wanted": "disk", "has_gpu": True}, "disk", "6.0 GB, as asked"),
        # Ranks of a node share the host's memory only where shared memory has the room.
        (
            {"num_ranks": 2, "ranks_per_node": 2, "room": replace(ROOMY, shared=GB)},
            "disk",
            "6.0 GB, 6.0 GB exceed what may be taken of the free shared memory of the node (600 MB)",
        ),
        ({"num_ranks": 2, "ranks_per_node": 2}, "host", "6.0 GB, fits"),
        ({"num_ranks": 2, "ranks_per_node": 1, "room": replace(ROOMY, shared=0)}, "host", "6.0 GB, fits"),
        (
            {"num_ranks": 2, "ranks_per_node": 2, "room": replace(ROOMY, host=GB)},
            "disk",
            f"6.0 GB, {NO_HOST}",
        ),
        # A device holds a rank's part, the host all of them.
        (
            {"has_gpu": True, "num_ranks": 8, "ranks_per_node": 8, "room": replace(ROOMY, device=2 * GB)},
            "device",
            "6.0 GB, fits",
        ),
        (
            {"has_gpu": True, "num_ranks": 8, "ranks_per_node": 8, "room": replace(ROOMY, device=GB)},
            "host",
            "6.0 GB, 750 MB exceed what may be taken of the free device memory per rank (600 MB)",
        ),
        # A place that failed is not tried again, asked for or not.
        ({"failed": frozenset({"host"})}, "disk", "6.0 GB, host failed"),
        (
            {"failed": frozenset({"host", "disk"})},
            "off",
            "computed anew at every use: 6.0 GB fit nowhere (host failed; disk failed)",
        ),
    ],
)
def test_the_place_and_why_it_is_that_one(facts, place, why):
    found = decide(**facts)
    assert (found.place, found.why) == (place, why)
    assert found.refused is None


@pytest.mark.parametrize(
    ("facts", "place", "refused"),
    [
        ({"wanted": "device", "room": replace(ROOMY, device=GB)}, "host", f"{NO_DEVICE}: kept in host instead"),
        ({"wanted": "host", "room": replace(ROOMY, host=GB)}, "disk", f"{NO_HOST}: kept in disk instead"),
        (
            {"wanted": "host", "has_gpu": True, "room": replace(ROOMY, host=GB)},
            "device",
            f"{NO_HOST}: kept in device instead",
        ),
        ({"wanted": "disk", "room": replace(ROOMY, disk=GB)}, "host", f"{NO_DISK}: kept in host instead"),
        (
            {"wanted": "disk", "room": replace(ROOMY, disk_limit=GB)},
            "host",
            "6.0 GB exceed engine.feature_cache_gigabytes (1.0 GB): kept in host instead",
        ),
        ({"wanted": "disk", "failed": frozenset({"disk"})}, "host", "disk failed: kept in host instead"),
        ({"wanted": "disk", "room": TIGHT}, "off", f"{NO_DISK}; {NO_HOST}: computed anew at every use"),
    ],
)
def test_a_wish_that_cannot_be_obeyed_is_refused_with_numbers(facts, place, refused):
    found = decide(**facts)
    assert (found.place, found.refused) == (place, refused)
    # The negative control: where there is room it is obeyed.
    assert decide(facts["wanted"]) == Choice(facts["wanted"], "6.0 GB, as asked")


def test_a_limit_of_nothing_keeps_auto_off_the_disk():
    found = decide(room=replace(ROOMY, host=0, disk_limit=0))
    assert found.place == "off"
    assert "6.0 GB exceed engine.feature_cache_gigabytes (0 kB)" in found.why
    assert decide(room=replace(ROOMY, host=0, disk_limit=NEED)).place == "disk"


@pytest.mark.parametrize(
    ("wanted", "name", "least"),
    [("device", "device", NEED / 0.6), ("host", "host", NEED / 0.6), ("disk", "disk", NEED / 0.9)],
)
def test_a_part_of_what_is_free_is_left_to_others(wanted, name, least):
    """60 % of memory, 90 % of the disk: the borders."""
    assert decide(wanted, replace(ROOMY, **{name: int(least) + 2})).place == wanted
    assert decide(wanted, replace(ROOMY, **{name: int(least) - 2})).place != wanted


def test_the_most_that_each_rank_holds_counts_where_it_does_not_divide_evenly():
    assert decide("device", replace(TIGHT, device=10), num_bytes=12, num_ranks=2).place == "device"
    assert decide("device", replace(TIGHT, device=10), num_bytes=13, num_ranks=2).place == "host"


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 kB"), (1, "1 kB"), (999_999, "1000 kB"), (10**6, "1 MB"), (12_340 * GB, "12,340.0 GB")],
)
def test_sizes_in_words(num_bytes, words):
    assert gigabytes(num_bytes) == words
