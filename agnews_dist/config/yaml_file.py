"""YAML configuration files: values with their line numbers, all problems of a file at once, and the way back."""

import textwrap
from pathlib import Path

import yaml

from agnews_dist.config.fields import Problems, Quoted, RawValue, all_sections, all_settings, format_value, is_path, values_of
from agnews_dist.config.schema import Config
from agnews_dist.errors import did_you_mean, quote
from agnews_dist.storage.directories import expand_path

SHIPPED = ("debug.yaml", "deepspeed.yaml", "gpt2_ddp.yaml", "gpt2_mini_cpu.yaml", "gpt2_xl_deepspeed.yaml", "quickstart.yaml")
EXAMPLE = "Write for example 'optim:' and below it '  lr: 0.001'."
MAX_BYTES = 100_000
"""Size of a file. All settings with their help take 10 kB; PyYAML reads 100 kB in a second."""
BUILDERS = {yaml.AnchorToken: "an anchor", yaml.AliasToken: "an alias", yaml.TagToken: "a tag"}


def find_config(path: str) -> Path:
    """Return the path itself, or a shipped file for its name (`debug.yaml`, `configs/debug.yaml`) if it does not exist."""
    given = Path(expand_path(path))
    if not given.exists() and given.name in SHIPPED and given.parent in (Path(), Path("configs")):
        package, repository = Path(__file__).resolve().parents[1:3]
        return next(filter(Path.is_file, (folder / "configs" / given.name for folder in (package, repository))), given)
    return given


def read_config(path: str, problems: Problems) -> list[RawValue]:
    """Return the values of a file in its order; add what is wrong to `problems` instead."""
    text = _read_text(path, problems)
    try:
        for token in (builders := [each for each in yaml.scan(text, Loader=yaml.SafeLoader) if type(each) in BUILDERS]):
            what = f"{path}, line {token.start_mark.line + 1}, has {BUILDERS[type(token)]}"
            problems.add(f"{what}: settings are plain values. Write the value itself.", "")
        root = None if builders else yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        problems.add(f"{path} is nested too deeply: settings are two levels deep. {EXAMPLE}", "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text[: getattr(error, "position", 0)].count("\n")
        what = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML").split())
        problems.add(f"{path}, line {line + 1}, is not valid YAML ({what}): its settings cannot be read. Correct the file.", "")
    else:
        if isinstance(root, yaml.MappingNode):
            return _read_mapping("", root, path, problems, {})
        if root is not None:
            problems.add(f"{path} holds {_describe(root)}: it must hold sections with settings. {EXAMPLE}", "")
    return []


def _read_text(path: str, problems: Problems) -> str:
    """Return the text of a file; empty if it is not a readable text of the size of a configuration."""
    try:
        with find_config(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return content.decode("utf-8-sig")
        problems.add(f"--config {path!r}: it is larger than {MAX_BYTES // 1000} kB. Give a file of settings, not of data.", "")
    except FileNotFoundError:
        hint = did_you_mean(path, [f"configs/{name}" for name in SHIPPED])
        problems.add(f"--config {path!r}: it does not exist.{hint} Shipped files are {', '.join(SHIPPED)}.", "")
    except OSError as error:
        problems.add(f"--config {path!r}: it cannot be read ({error.strerror}). Give a readable YAML file.", "")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add(f"--config {path!r}: byte {error.start} (line {line}) is not UTF-8. Save the file as UTF-8.", "")
    except ValueError as error:
        problems.add(f"--config {path!r}: {error}", "")
    return ""


def _read_mapping(
    prefix: str, mapping: yaml.MappingNode, path: str, problems: Problems, first_line: dict[str, int]
) -> list[RawValue]:
    """Return the values below one mapping; `prefix` is `optim.` inside the section optim and empty at the top."""
    found: list[RawValue] = []
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        place = f"{path}, line {line}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(f"{_describe(key_node)} as a key ({place}): keys are names of settings. {EXAMPLE}", "")
            continue
        key = f"{prefix}{key_node.value}"
        source = f"{key} {_describe(node)} ({place})"
        if key in first_line:
            lines = f"{path}, lines {first_line[key]} and {line}"
            problems.add(f"{key} twice ({lines}): only one can count. Remove one.", key)
        elif key in all_settings():
            found.append(RawValue(key, _read_node(node), source, place))
        elif key not in all_sections():
            valid = [*all_settings(), *([] if prefix else all_sections())]
            problems.add_unknown(key, f"unknown key {quote(key)} ({place})", valid)
        elif isinstance(node, yaml.MappingNode):
            found += _read_mapping(f"{key}.", node, path, problems, first_line)
        elif node.value != "" or node.style is not None:  # an empty section is right: its settings may be commented out
            problems.add(f"{source}: a section takes settings below it. {EXAMPLE}", f"{key}.")
        first_line.setdefault(key, line)
    return found


def _read_node(node: yaml.Node) -> object:
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        is_null = node.tag == "tag:yaml.org,2002:null" and node.style is None
        return None if is_null else node.value if node.style is None else Quoted(node.value)
    return {}


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return quote(node.value) if node.value or node.style else "null"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def dump(config: Config, *, only_changed: bool = False) -> str:
    """Format as YAML that `--config` reads back as an equal `Config`: all settings with their help, or those that differ."""
    values, parts, written = dict(values_of(config)), list[str](), set[str]()
    for section, (_, text) in all_sections().items():
        indent = "  " * section.count(".")
        lines: list[str] = []
        for key, setting in all_settings().items():
            if setting.section == section and not (only_changed and values[key] == setting.default):
                lines += [] if only_changed else [f"  # {line}" for line in textwrap.wrap(setting.help, 116)]
                lines.append(f"  {setting.name}: {format_value(values[key], escape=is_path(setting.type))}")
        outer, _, name = section.rpartition(".")
        if lines:
            # A section whose outer one has nothing to say needs its head all the same.
            parts += [f"{outer}:\n"] if outer and outer not in written else []
            head = [f"{name}:"] if only_changed else [f"# {text}", f"{name}:"]
            parts.append("".join(f"{indent}{line}\n" for line in [*head, *lines]))
            written.add(section)
    return ("" if only_changed else "\n").join(parts) or "{}\n"
