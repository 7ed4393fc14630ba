"""Readers of the local stores of experiment trackers, each by the client's own code."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.processes import python


@dataclass
class Record:
    """Content of a tracker's store for one run."""

    id: str
    settings: dict[str, Any]
    numbers: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, step and value, as a 32-bit float holds it."""
    final: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    state: str = ""
    """State of the run, in the words of the tracker; empty if it keeps none."""

    def add(self, name: str, step: float, value: float) -> None:
        """Count a number."""
        if name.startswith("final/"):
            self.final[name] = round_to_32_bits(value)
        else:
            self.numbers.append((name, int(step), round_to_32_bits(value)))


def round_to_32_bits(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def read_tensorboard(run: Path) -> list[Record]:
    """Read the event files as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    [content] = events.PluginTagToContent("hparams").values()
    info = HParamsPluginData.FromString(content).session_start_info
    settings = {key: getattr(value, value.WhichOneof("kind")) for key, value in info.hparams.items()}
    record = Record(info.group_name, settings)
    for name in events.Tags()["scalars"]:
        for each in events.Scalars(name):
            record.add(name, each.step, each.value)
    if "files" in events.Tags()["tensors"]:
        [text] = events.Tensors("files")
        record.files = [Path(line).name for line in text.tensor_proto.string_val[0].decode().split("\n\n")]
    return [record]


def read_wandb(run: Path) -> list[Record]:
    """Read the transaction logs of W&B: every offline directory is a record, to be uploaded on its own."""
    return [_read_wandb_log(path) for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"))]


def _read_wandb_log(path: Path) -> Record:
    record = Record("", {})
    for each in _wandb_records(path.read_bytes()):
        kind = each.WhichOneof("record_type")
        if kind == "run":
            record.id = each.run.run_id
            record.settings = {item.key: json.loads(item.value_json) for item in each.run.config.update}
        elif kind == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in each.history.item}
            for name in row:
                if "/" in name:
                    record.add(name, row["step"], row[name])
        elif kind == "summary":
            for item in each.summary.update:
                if item.key.startswith("final/"):
                    record.add(item.key, 0, json.loads(item.value_json))
        elif kind == "exit":
            record.state = f"exit code {each.exit.exit_code}"
        elif kind == "files":
            record.files += [file.path for file in each.files.files if (path.parent / "files" / file.path).is_file()]
    return record


def _wandb_records(data: bytes) -> Iterator[Any]:
    """Split a log in LevelDB's format: blocks of 32 KiB; header of a fragment: checksum, length, kind (1 whole, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    offset, content = 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        content += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield WandbRecord.FromString(content)
            content = b""


def read_mlflow(run: Path) -> list[Record]:
    """Read the file store through MLflow's client."""
    os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("agnews_dist")
    records = []
    for each in client.search_runs([experiment.experiment_id]) if experiment else []:
        record = Record(each.info.run_id, each.data.params, state=each.info.status)
        for name in each.data.metrics:
            for number in client.get_metric_history(each.info.run_id, name):
                record.add(name, number.step, number.value)
        record.files = [file.path for file in client.list_artifacts(each.info.run_id)]
        records.append(record)
    return records


def read_trackio(run: Path) -> list[Record]:
    """Read the database through trackio."""
    os.environ["TRACKIO_DIR"] = str(run / "trackio")
    from trackio.sqlite_storage import SQLiteStorage as Storage

    records = []
    for each in Storage.get_run_records("agnews_dist"):
        record = Record(each["id"], Storage.get_run_config("agnews_dist", each["name"], run_id=each["id"]))
        for row in Storage.get_logs("agnews_dist", each["name"], run_id=each["id"]):
            for name in row:
                if "/" in name:
                    record.add(name, row["step"], row[name])
        record.files = [artifact["name"] for artifact in Storage.list_artifacts("agnews_dist")]
        records.append(record)
    return records


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def read_records(tracker: str, run: Path) -> list[Record]:
    """Read what a tracker has of a run, in a process of its own: clients change their process for good."""
    lines = python("-m", "support.tracker_stores", tracker, str(run.resolve())).stdout.splitlines()
    records = [Record(**each) for each in json.loads(lines[-1])]
    for record in records:
        record.numbers = [tuple(number) for number in record.numbers]
    return records


if __name__ == "__main__":
    print(json.dumps([vars(record) for record in READERS[sys.argv[1]](Path(sys.argv[2]))], allow_nan=False))
