"""YAML configuration files: values with their line numbers, and all problems of a file at once."""

from pathlib import Path
from typing import Literal

import yaml

from agnews_dist.config.fields import Problems, RawValue, all_sections, all_settings, format_unknown_name, to_one_line
from agnews_dist.errors import did_you_mean

SHIPPED = ("debug.yaml", "deepspeed.yaml", "gpt2_ddp.yaml", "gpt2_mini_cpu.yaml", "gpt2_xl_deepspeed.yaml", "quickstart.yaml")
EXAMPLE = "Write for example 'optim:' and below it '  lr: 0.001'."


def find_config(path: str) -> Path:
    """Return the path itself, or the shipped file if `debug.yaml` or `configs/debug.yaml`, say, does not exist.

    No other path is replaced: a mistyped path must not silently become another file.
    """
    given = Path(path)
    if not given.exists() and given.name in SHIPPED and given.parent in (Path(), Path("configs")):
        package = Path(__file__).resolve().parents[1]
        for directory in (package / "configs", package.parent / "configs"):
            if (directory / given.name).is_file():
                return directory / given.name
    return given


def read_config(path: str, problems: Problems) -> list[RawValue]:
    """Return the values of a file in its order; add what is wrong to `problems` instead."""
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
            f"{path}{line} is not valid YAML ({to_one_line(str(what))}): its settings cannot be read. Correct the file."
        )
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.add(f"{path} holds {_describe(root)}: it must hold sections with settings. {EXAMPLE}")
        return []
    return _read_mapping("", root, path, problems, {})


def _read_text(path: str, problems: Problems) -> str | None:
    try:
        return find_config(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(path, [f"configs/{name}" for name in SHIPPED])
        problems.add(f"--config {path!r}: it does not exist.{hint} Shipped files are {', '.join(SHIPPED)}.")
    except OSError as error:
        problems.add(f"--config {path!r}: it cannot be read ({error.strerror}). Give a readable YAML file.")
    except UnicodeDecodeError as error:
        problems.add(f"--config {path!r}: byte {error.start} is not UTF-8. Save the file as UTF-8.")
    return None


def _read_mapping(
    prefix: str, mapping: yaml.MappingNode, path: str, problems: Problems, first_line: dict[str, int]
) -> list[RawValue]:
    """Return the values below one mapping; `prefix` is `optim.` inside the section optim and empty at the top."""
    found: list[RawValue] = []
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(f"{_describe(key_node)} as a key ({path}, line {line}): keys are names of settings. {EXAMPLE}")
            continue
        key = f"{prefix}{key_node.value}"
        source = f"{key} {_describe(node)} ({path}, line {line})"
        if key in first_line:
            problems.add(f"{key} twice ({path}, lines {first_line[key]} and {line}): only one can count. Remove one.")
        elif key in all_settings():
            found.append(RawValue(key, str(node.value), source, _syntax_of(node)))
        elif key not in all_sections():
            valid = [*all_settings(), *([] if prefix else all_sections())]
            message = format_unknown_name(key, f"unknown key {key!r} ({path}, line {line})", valid)
            problems.add(message, loses_value=False)
        elif isinstance(node, yaml.MappingNode):
            found += _read_mapping(f"{key}.", node, path, problems, first_line)
        elif node.value != "":  # an empty section is right: its settings may be commented out
            problems.add(f"{source}: a section takes settings below it. {EXAMPLE}")
        first_line.setdefault(key, line)
    return found


def _syntax_of(node: yaml.Node) -> Literal["plain", "quoted", "null", "collection"]:
    if not isinstance(node, yaml.ScalarNode):
        return "collection"
    if node.style is not None:
        return "quoted"
    return "null" if node.tag == "tag:yaml.org,2002:null" else "plain"


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value or node.style else "null"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
