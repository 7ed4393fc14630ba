"""`agnews-dist export`: the exported model of a run in another format, checked against the original."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError

COMMAND = Command(
    "export",
    "Write the model of a run as an ONNX file. The file is checked against the model.",
    (
        "agnews-dist export runs/NAME --format onnx",
        "agnews-dist export runs/NAME --output served/news.onnx",
        "agnews-dist export runs/NAME/model --output news.onnx",
    ),
    (
        Option("run", "A run's directory, or an exported one.", PathText, nargs="*"),
        Option("--format", "Format of the file.", Literal["onnx"], "onnx"),
        Option("--output", "The file; default: model.onnx in RUN.", PathText),
    ),
    settings=(),
)


def run(world: World, loaded: Loaded) -> None:
    """Write the file on rank 0."""
    runs: Sequence[str] = loaded.options["run"]
    if len(runs) != 1:
        raise ConfigError(f"export of {len(runs)} runs: it takes one. Write agnews-dist export RUN.")
    if not world.is_main:
        return
    # Imported here, so that --help does not wait for torch.
    with importing():
        from agnews_dist.model.export import find_export
        from agnews_dist.model.onnx_file import check_onnx_packages, write_onnx

    check_onnx_packages()
    directory, output = find_export(runs[0]), loaded.options["output"]
    file = Path(output) if output is not None else Path(runs[0]) / "model.onnx"
    difference = write_onnx(directory, file)
    print(f"{file} written: checked, logits differ by at most {difference:.1e}")
