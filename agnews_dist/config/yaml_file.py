"""A YAML configuration file -> the values given in it, each with its line, and all that is wrong with the file."""

from pathlib import Path
from typing import Literal

import yaml

from agnews_dist.config.fields import Given, Problems, all_sections, all_settings, one_line, unknown_name
from agnews_dist.errors import did_you_mean

SHIPPED = (
    "debug.yaml",
    "deepspeed.yaml",
    "gpt2_ddp.yaml",
    "gpt2_mini_cpu.yaml",
    "gpt2_xl_deepspeed.yaml",
    "quickstart.yaml",
)
EXAMPLE = "Write for example 'optim:' and below it '  lr: 0.001'."


def find_config(path: str) -> Path:
    """The file itself; or the shipped file when `debug.yaml` or `configs/debug.yaml` is not there.

    Any other path is returned as it is: a mistyped path must not silently become another file.
    """
    given = Path(path)
    if not given.exists() and given.name in SHIPPED and given.parent in (Path(), Path("configs")):
        package = Path(__file__).resolve().parents[1]
        for directory in (package / "configs", package.parent / "configs"):
            if (directory / given.name).is_file():
                return directory / given.name
    return given


def read_config(path: str, problems: Problems) -> list[Given]:
    """The values of one file in its order. What is wrong goes to `problems` and is left out."""
    text = _read_text(path, problems)
    if text is None:
        return []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        problems.add(
            f"{path}{line} is no valid YAML ({one_line(str(what))}): its settings cannot be read. Correct the file."
        )
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.add(f"{path} holds {_shown(root)}: a configuration is sections with settings below. {EXAMPLE}")
        return []
    return _read_mapping("", root, path, problems, {})


def _read_text(path: str, problems: Problems) -> str | None:
    try:
        return find_config(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(path, [f"configs/{name}" for name in SHIPPED])
        problems.add(f"--config {path!r}: there is no such file.{hint} Shipped are {', '.join(SHIPPED)}.")
    except OSError as error:
        problems.add(f"--config {path!r}: it cannot be read ({error.strerror}). Give a readable YAML file.")
    except UnicodeDecodeError as error:
        problems.add(f"--config {path!r}: byte {error.start} is not UTF-8. Save the file as UTF-8.")
    return None


def _read_mapping(
    prefix: str, mapping: yaml.MappingNode, path: str, problems: Problems, first_line: dict[str, int]
) -> list[Given]:
    """The values below one mapping; `prefix` is `optim.` inside the section optim and empty at the top."""
    found: list[Given] = []
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(f"{_shown(key_node)} as a key ({path}, line {line}): keys are names of settings. {EXAMPLE}")
            continue
        key = f"{prefix}{key_node.value}"
        place = f"{key} {_shown(node)} ({path}, line {line})"
        if key in first_line:
            problems.add(f"{key} twice ({path}, lines {first_line[key]} and {line}): only one can hold. Remove one.")
        elif key in all_settings():
            found.append(Given(key, str(node.value), place, _syntax(node)))
        elif key not in all_sections():
            valid = [*all_settings(), *([] if prefix else all_sections())]
            problems.add(unknown_name(key, f"unknown key {key!r} ({path}, line {line})", valid), value_lost=False)
        elif isinstance(node, yaml.MappingNode):
            found += _read_mapping(f"{key}.", node, path, problems, first_line)
        elif node.value != "":  # a section whose settings are all commented out is empty, not wrong
            problems.add(f"{place}: a section takes settings below it. {EXAMPLE}")
        first_line.setdefault(key, line)
    return found


def _syntax(node: yaml.Node) -> Literal["plain", "quoted", "null", "collection"]:
    if not isinstance(node, yaml.ScalarNode):
        return "collection"
    if node.style is not None:
        return "quoted"
    return "null" if node.tag == "tag:yaml.org,2002:null" else "plain"


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value or node.style else "null"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
