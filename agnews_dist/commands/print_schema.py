"""`agnews-dist schema`: the JSON schema of configuration files, for editors, or all settings as a page (docs/settings.md)."""

import json
from collections.abc import Iterator
from typing import Any, Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.config.fields import all_sections, all_settings, describe_type, format_value
from agnews_dist.config.schema import Config
from agnews_dist.distributed.world import World

COMMAND = Command(
    "schema",
    "Print the JSON schema of configuration files. Editors complete and check settings with it.",
    (
        "agnews-dist schema > settings.schema.json",
        "echo '# yaml-language-server: $schema=settings.schema.json' >> my.yaml",
        "agnews-dist schema --format markdown",
    ),
    (Option("--format", "JSON schema, or a page for readers.", Literal["json", "markdown"], "json"),),
    settings=(),
)


def run(world: World, loaded: Loaded) -> None:
    """Print the schema or the page, on rank 0."""
    if world.is_main:
        print(
            settings_page() if loaded.options["format"] == "markdown" else json.dumps(json_schema(), indent=1, allow_nan=False)
        )


def json_schema() -> dict[str, Any]:
    """Return pydantic's schema of a configuration file, with the help of each setting."""
    schema: dict[str, Any] = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section, (model, _) in all_sections().items():
        for name, entry in schema["$defs"][model.__name__]["properties"].items():
            if f"{section}.{name}" in all_settings():
                entry["description"] = all_settings()[f"{section}.{name}"].help
    return schema


def settings_page() -> str:
    """Return docs/settings.md: a table of the settings of each section."""
    return "\n".join(_lines_of_page())


def _lines_of_page() -> Iterator[str]:
    yield "# Settings"
    yield ""
    yield "Written by `agnews-dist schema --format markdown`. Bold: the settings of `agnews-dist train --help`."
    yield ""
    yield "**On resume**: a resumed run refuses another value (*must match*), refuses it unless `--accept` names the setting"
    yield "(*may be accepted*), or does not compare it (*ignored*). What a path or hub id holds is compared by its content."
    yield ""
    yield "**In a sweep**: members may differ in it (*free*), may differ, but each value needs a feature cache of its own"
    yield "(*changes features*), or may not (*not sweepable*; *decides scored rows*: scores of other rows cannot be compared)."
    yield "*Ignored*: without effect on members."
    for section, (_, text) in all_sections().items():
        yield from ("", f"## {section}", "", text, "")
        yield "| setting | takes | default | on resume | in a sweep | what it does |"
        yield "|---|---|---|---|---|---|"
        for key, setting in all_settings().items():
            if setting.section == section:
                name = f"**`{key}`**" if setting.level == "basic" else f"`{key}`"
                cells = (
                    name,
                    describe_type(setting.type),
                    f"`{format_value(setting.default)}`",
                    setting.resume,
                    setting.sweep,
                    setting.help,
                )
                yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
