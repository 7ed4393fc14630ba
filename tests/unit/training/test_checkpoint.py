"""Checkpoints: read back bit for bit; damage and foreign content are found, with the names of directory and file."""

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from agnews_dist.run.resume import read_newest_usable
from agnews_dist.storage.atomic import discard
from agnews_dist.training.checkpoint import (
    PIECE_BYTES,
    DamagedError,
    list_checkpoints,
    prune,
    read_checkpoint,
    sweep,
    write_checkpoint,
)

STATE = {"step": 7, "loss": 0.1 + 0.2, "worst": float("inf"), "best": None, "text": "Zürich \ud83d \n", "list": [1, [2.5]]}


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    random_bits = torch.Generator().manual_seed(seed)
    return {
        "weights": {
            "h.0.weight": torch.randn(5, 7, generator=random_bits),
            "bf16": torch.randn(3, generator=random_bits).bfloat16(),
            "bool": torch.tensor([True, False, True]),
            "not finite": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        },
        "moments": {
            "float64": torch.randn(2, 3, generator=random_bits, dtype=torch.float64),
            "int64": torch.tensor([-(2**63), 2**63 - 1]),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "odd/name \"'\\ \n\t Zürich 中 ../x": torch.arange(3, dtype=torch.uint8),
            "": torch.tensor([1.5], requires_grad=True),
            "empty": torch.empty(0),
            "no rows": torch.empty(0, 3, dtype=torch.float64),
        },
        "nothing": {},
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, list[int], bytes]:
    return tensor.dtype, list(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors) -> dict[str, dict[str, tuple[torch.dtype, list[int], bytes]]]:
    return {group: {name: bits(tensor) for name, tensor in named.items()} for group, named in tensors.items()}


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def path(folder) -> Path:
    """A whole checkpoint."""
    path = folder / "step-00000007"
    write_checkpoint(path, some_tensors(), STATE)
    return path


def small(path: Path, step: int = 1) -> Path:
    write_checkpoint(path, {"weights": {"w": torch.full((2,), float(step))}}, {"step": step})
    return path


def test_checkpoint_is_read_back_bit_for_bit(path):
    checkpoint = read_checkpoint(path)
    assert checkpoint.path == path
    assert all_bits(checkpoint.tensors) == all_bits(some_tensors())
    assert checkpoint.state == STATE


@pytest.mark.parametrize("dtype", ["float16", "int32", "int16", "int8", "uint64", "uint32", "uint16"])
def test_checkpoint_holds_every_other_type(folder, dtype):
    tensors = {"weights": {"w": torch.tensor([[0, 1, 100]]).to(getattr(torch, dtype))}}
    write_checkpoint(folder / "step-00000001", tensors, {})
    assert all_bits(read_checkpoint(folder / "step-00000001").tensors) == all_bits(tensors)


def test_large_tensor_is_written_in_pieces(folder):
    large = torch.arange(PIECE_BYTES // 4 * 2 + 3, dtype=torch.float32)
    num_bytes = write_checkpoint(folder / "step-00000001", {"weights": {"w": large}}, {})
    assert num_bytes > 2 * PIECE_BYTES
    assert torch.equal(read_checkpoint(folder / "step-00000001").tensors["weights"]["w"], large)


def test_tensor_files_have_the_format_of_safetensors(path):
    for group, tensors in some_tensors().items():
        file = path / f"{group}.safetensors"
        assert all_bits({group: safetensors.torch.load_file(file)}) == all_bits({group: tensors})
        with safetensors.safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name: bits(opened.get_tensor(name)) for name in opened.keys()} == all_bits({group: tensors})[group]  # noqa: SIM118
        content = file.read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        for name, tensor in tensors.items():
            assert header[name]["data_offsets"][0] % tensor.itemsize == 0, "a reader may map it"


def test_manifest_lists_every_file_with_checksum_and_size(folder):
    path = folder / "best-00000100"
    num_bytes = write_checkpoint(path, some_tensors(), STATE)
    *lines, last, nothing = (path / "MANIFEST").read_text().split("\n")
    assert nothing == ""
    expected = ["moments.safetensors", "nothing.safetensors", "state.json", "weights.safetensors"]
    assert lines == [
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()} {(path / name).stat().st_size} {name}" for name in expected
    ]
    assert last == hashlib.sha256(b"".join(line.encode() + b"\n" for line in lines)).hexdigest()
    assert names(path) == ["MANIFEST", *expected]
    assert num_bytes == sum(file.stat().st_size for file in path.iterdir())
    assert json.loads((path / "state.json").read_bytes()) == STATE


def test_checkpoint_has_the_permissions_of_other_files(path):
    plain = path.parent / "plain"
    plain.mkdir()
    (plain / "file").touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert {file.stat().st_mode for file in path.iterdir()} == {(plain / "file").stat().st_mode}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MANIFEST", "state.json"])
def test_flipped_bit_is_found_at_every_position(path, name):
    content = (path / name).read_bytes()
    assert len(content) > 100
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(DamagedError, match=name):
            read_checkpoint(path)
    (path / name).write_bytes(content)
    read_checkpoint(path)


def test_flipped_bit_in_the_tensors_is_found(path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for name in ("weights.safetensors", "moments.safetensors", "nothing.safetensors"):
        content = (path / name).read_bytes()
        for position in rng.sample(range(len(content)), k=min(60, len(content))):
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(flipped)
            with pytest.raises(DamagedError, match=f"{name} has another checksum"):
                pytest.fail(f"byte {position} of {name} was flipped in {read_checkpoint(path)}")
        (path / name).write_bytes(content)


def edit(path: Path, name: str, change) -> None:
    (path / name).write_bytes(change((path / name).read_bytes()))


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def swap(path: Path, one: str, other: str) -> None:
    (path / one).rename(path / "aside")
    (path / other).rename(path / one)
    (path / "aside").rename(path / other)


def take_from_another(path: Path, name: str) -> None:
    write_checkpoint(path.with_name("step-00000009"), some_tensors(seed=1), {**STATE, "step": 9})
    shutil.copy(path.with_name("step-00000009") / name, path / name)


def with_lines(lines: list[bytes]) -> bytes:
    text = b"".join(line + b"\n" for line in lines)
    return text + hashlib.sha256(text).hexdigest().encode() + b"\n"


def relined(change):
    """Replace the lines of MANIFEST, with the right checksum of the new ones."""
    return lambda text: with_lines(change(text.split(b"\n")[:-2]))


DAMAGES = {
    "truncated": (lambda path: edit(path, "weights.safetensors", lambda text: text[:-1]), r"weights.safetensors has \d+ bytes"),
    "emptied": (lambda path: edit(path, "state.json", lambda text: b""), "state.json has 0 bytes instead of"),
    "extended": (lambda path: edit(path, "moments.safetensors", lambda text: text + b"\0"), r"moments.safetensors has \d+"),
    "missing": (lambda path: (path / "moments.safetensors").unlink(), "moments.safetensors is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "MANIFEST").unlink(), "MANIFEST is missing"),
    "additional file": (lambda path: (path / "more.safetensors").touch(), "more.safetensors does not belong there"),
    "additional directory": (lambda path: (path / "more").mkdir(), "more does not belong there"),
    "swapped": (lambda path: swap(path, "weights.safetensors", "moments.safetensors"), "moments.safetensors has"),
    "of another": (lambda path: take_from_another(path, "weights.safetensors"), "weights.safetensors has another checksum"),
    "manifest of another": (lambda path: take_from_another(path, "MANIFEST"), "has another checksum"),
    "empty": (empty, "MANIFEST is missing"),
    "a file": (become_a_file, "cannot be listed, Not a directory"),
    "gone": (shutil.rmtree, "cannot be listed, No such file or directory"),
    "directory for a file": (lambda path: [(path / "state.json").unlink(), (path / "state.json").mkdir()], "state.json is"),
    "pipe for a file": (lambda path: [(path / "state.json").unlink(), os.mkfifo(path / "state.json")], "state.json is"),
    "link to nothing": (
        lambda path: [(path / "state.json").unlink(), (path / "state.json").symlink_to("nowhere")],
        "state.json is missing",
    ),
    "endless links": (
        lambda path: [(path / "state.json").unlink(), (path / "state.json").symlink_to("state.json")],
        "state.json",
    ),
    "manifest emptied": (lambda path: edit(path, "MANIFEST", lambda text: b""), "MANIFEST is changed"),
    "manifest and a byte": (lambda path: edit(path, "MANIFEST", lambda text: text + b"\n"), "MANIFEST is changed"),
    "manifest less a byte": (lambda path: edit(path, "MANIFEST", lambda text: text[:-1]), "MANIFEST is changed"),
    "manifest with Windows' lines": (
        lambda path: edit(path, "MANIFEST", lambda text: text.replace(b"\n", b"\r\n")),
        "MANIFEST is changed",
    ),
    "manifest without its checksum": (
        lambda path: edit(path, "MANIFEST", lambda text: b"\n".join([*text.split(b"\n")[:-2], b""])),
        "MANIFEST is changed",
    ),
    "manifest twice": (lambda path: edit(path, "MANIFEST", lambda text: text * 2), "MANIFEST is changed"),
    "manifest not UTF-8": (lambda path: edit(path, "MANIFEST", lambda text: b"\xff\xfe" + text), "MANIFEST is changed"),
    "manifest in another order": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: lines[::-1])),
        "MANIFEST is changed",
    ),
    "manifest with a line twice": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: lines + lines[-1:])),
        "MANIFEST is changed",
    ),
    "manifest with a line less": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: lines[:-1])),
        "weights.safetensors does not belong there",
    ),
    "manifest with a line more": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: [*lines, b"0" * 64 + b" 1 z.safetensors"])),
        "z.safetensors is missing",
    ),
    "manifest without the state": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: [line for line in lines if b"state" not in line])),
        "state.json does not belong there",
    ),
    "manifest that leaves the directory": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: [*lines, b"0" * 64 + b" 1 ../z"])),
        "MANIFEST is changed|../z is missing",
    ),
    "manifest with a huge size": (
        lambda path: edit(path, "MANIFEST", relined(lambda lines: [*lines, b"0" * 64 + b" " + b"9" * 5000 + b" z"])),
        "MANIFEST is changed",
    ),
}


@pytest.mark.parametrize(("damage", "what"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_reported_with_directory_and_file(path, damage, what):
    damage(path)
    with pytest.raises(DamagedError, match=what) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("): no run can resume from it. Restore the directory from a copy, or remove it.")
    checkpoint, best, warnings = read_newest_usable(path.parent)
    if damage is DAMAGES["gone"][0]:
        assert (checkpoint, warnings) == (None, [])
    elif path.with_name("step-00000009").exists():
        assert checkpoint is not None
        assert (checkpoint.state["step"], best, warnings) == (9, None, [])
    else:
        assert checkpoint is None
        assert len(warnings) == 1
        assert warnings[0].startswith(str(caught.value))


def test_hidden_files_are_ignored(path):
    (path / ".nfs0001").touch()
    assert read_checkpoint(path).state == STATE


def forge(path: Path, contents: dict[str, bytes]) -> Path:
    """Make a directory with these files and their right checksums."""
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()} {len(contents[name])} {name}".encode() for name in sorted(contents)]
    (path / "MANIFEST").write_bytes(with_lines(lines))
    return path


def one_tensor(**entry) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


FORGED = {
    "state is not JSON": {"state.json": b"{"},
    "state is not text": {"state.json": b"\xff"},
    "state is a list": {"state.json": b"[]"},
    "state is too deep": {"state.json": b"[" * 100_000},
    "an empty file": {"state.json": b"{}", "weights.safetensors": b""},
    "a header beyond the end": {"state.json": b"{}", "weights.safetensors": struct.pack("<Q", 2**63) + b"{}"},
    "an unknown type": {"state.json": b"{}", "weights.safetensors": one_tensor(dtype="X9")},
    "a type that torch has not": {"state.json": b"{}", "weights.safetensors": one_tensor(dtype="F4", shape=[8])},
    "offsets beyond the end": {"state.json": b"{}", "weights.safetensors": one_tensor(data_offsets=[0, 400])},
    "another size": {"state.json": b"{}", "weights.safetensors": one_tensor(shape=[2**40, 2**40])},
    "another kind of file": {"state.json": b"{}", "model.pt": b"text"},
}


@pytest.mark.parametrize("contents", FORGED.values(), ids=list(FORGED))
def test_content_of_another_format_counts_as_damage(folder, contents):
    with pytest.raises(DamagedError, match="its content has another format"):
        read_checkpoint(forge(folder / "step-00000001", contents))


def test_forged_directory_with_the_right_format_is_read(folder):
    # Negative control of the test above.
    contents = {"state.json": b"{}", "weights.safetensors": one_tensor()}
    assert read_checkpoint(forge(folder / "step-00000001", contents)).tensors["weights"]["w"].tolist() == [0.0]


def test_newest_usable_skips_damaged_checkpoints(folder):
    for step in (1, 2, 3):
        small(folder / f"step-{step:08d}", step)
    edit(folder / "step-00000003", "state.json", lambda text: text + b" ")
    (folder / "step-00000002" / "MANIFEST").unlink()
    checkpoint, _, warnings = read_newest_usable(folder)
    assert checkpoint is not None
    assert checkpoint.state == {"step": 1}
    assert [warning.split(" is damaged ")[0] for warning in warnings] == [
        str(folder / "step-00000003"),
        str(folder / "step-00000002"),
    ]
    assert "state.json" in warnings[0]
    assert "MANIFEST" in warnings[1]


@pytest.mark.parametrize("damaged", [False, True])
def test_write_replaces_an_existing_checkpoint(path, damaged):
    if damaged:
        (path / "MANIFEST").unlink()
        (path / "more").mkdir()
    small(path, step=8)
    assert read_checkpoint(path).state == {"step": 8}
    assert names(path) == ["MANIFEST", "state.json", "weights.safetensors"]
    assert hidden(path.parent) == []


def test_write_replaces_a_file_of_that_name(folder):
    folder.mkdir()
    (folder / "step-00000001").write_text("a file")
    assert read_checkpoint(small(folder / "step-00000001")).state == {"step": 1}
    assert hidden(folder) == []


NOT_STORED = {
    "a name that safetensors reserves": ({"weights": {"__metadata__": torch.zeros(1)}}, {}),
    "a name that is not text": ({"weights": {"\ud800": torch.zeros(1)}}, {}),
    "columns": ({"weights": {"w": torch.zeros(2, 3).T}}, {}),
    "another device": ({"weights": {"w": torch.zeros(2, device="meta")}}, {}),
    "complex": ({"weights": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}),
    "a group that leaves the directory": ({"../weights": {}}, {}),
    "a hidden group": ({".weights": {}}, {}),
}


@pytest.mark.parametrize(("tensors", "state"), NOT_STORED.values(), ids=list(NOT_STORED))
def test_write_refuses_content_that_could_not_be_read_back(folder, tensors, state):
    with pytest.raises(ValueError, match=r"cannot be stored|is not a name|surrogates"):
        write_checkpoint(folder / "step-00000001", tensors, state)
    assert not folder.exists()


def test_write_refuses_a_state_that_json_cannot_hold(folder):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_checkpoint(folder / "step-00000001", {}, {"a": object()})
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.old", ".step-00000001", "last", "step-00000001-done", "epoch-00000001"]
)
def test_write_refuses_a_name_that_would_not_be_listed(folder, name):
    with pytest.raises(ValueError, match="is not a name for a checkpoint"):
        write_checkpoint(folder / name, {}, {})
    assert not folder.exists()


def test_list_checkpoints_is_newest_first_and_scored_before_unscored(folder):
    assert list_checkpoints(folder) == []
    folder.mkdir()
    ours = ["step-00000009", "step-00000100-scored", "step-00000100", "best-00000100", "step-123456789", "step-00000002-scored"]
    others = [".step-00000009.0", "step-9", "step-00000009.tmp", "step-0000000x", "step-00000009-", "events.jsonl", "stepper"]
    for name in [*ours, *others]:
        (folder / name).mkdir()
    found = ["step-123456789", "step-00000100-scored", "step-00000100", "step-00000009", "step-00000002-scored"]
    assert [path.name for path in list_checkpoints(folder)] == found
    assert list_checkpoints(folder, "best") == [folder / "best-00000100"]
    assert list_checkpoints(folder / "events.jsonl" / "deeper") == []


def test_list_checkpoints_of_a_file_is_empty(tmp_path):
    (tmp_path / "file").touch()
    assert list_checkpoints(tmp_path / "file") == []


def test_prune_keeps_the_newest_and_those_named(folder):
    for name in ("step-00000001", "step-00000002", "step-00000003", "step-00000003-scored", "best-00000001", "best-00000003"):
        small(folder / name)
    (folder / "step-00000000").touch()
    (folder / "notes").mkdir()
    before = files(folder / "step-00000003")
    prune(folder, 2, also={"best-00000003", "step-00000001"})
    assert names(folder) == [*("best-00000003", "notes", "step-00000001", "step-00000003", "step-00000003-scored")]
    assert files(folder / "step-00000003") == before
    prune(folder, 5, also=())
    assert names(folder) == ["notes", "step-00000001", "step-00000003", "step-00000003-scored"]


def test_prune_and_sweep_ignore_a_missing_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "absent", tmp_path / "file"):
        prune(folder, 1, also=())
        sweep(folder)
        discard([folder / "step-00000001"])
    assert names(tmp_path) == ["file"]


def test_discard_removes_the_given_paths(folder):
    small(folder / "step-00000001")
    small(folder / "step-00000002")
    discard([folder / "step-00000002", folder / "step-00000003"])
    assert names(folder) == ["step-00000001"]


def test_sweep_removes_only_leftovers_of_killed_saves(path):
    folder = path.parent
    number = "0" * 32
    for name in (f".step-00000008.{number}", f".old-step-00000007-scored.{number}", f".best-00000001.{number}"):
        shutil.copytree(path, folder / name)
    (folder / f".old-step-00000001.{number}").touch()
    others = [".nfs0001", ".step-00000008", ".git", "step-00000007"]
    for name in others[:3]:
        (folder / name).mkdir()
    sweep(folder)
    assert names(folder) == sorted(others)
    assert read_checkpoint(path).state == STATE


def test_checkpoint_that_does_not_fit_in_memory_is_not_damaged(path, monkeypatch):
    # A file that large would take minutes to write.
    monkeypatch.setattr(safetensors.torch, "load", lambda _: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="allocate memory"):
        read_checkpoint(path)
