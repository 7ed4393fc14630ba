"""The JSON schema and the settings page follow from the schema of the settings."""

import jsonschema
import pytest
import yaml
from support.processes import REPOSITORY

from agnews_dist.commands.print_schema import json_schema, settings_page
from agnews_dist.config.fields import all_sections, all_settings
from agnews_dist.config.schema import Config


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_schema_accepts_the_defaults_and_every_shipped_file() -> None:
    validator().validate(Config().model_dump())
    files = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert len(files) == 6
    for path in files:
        validator().validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"optim": {"lrr": 1}},
        {"optm": {}},
        {"optim": {"epochs": 0}},
        {"optim": {"epochs": 1.5}},
        {"optim": {"schedule": "cosin"}},
        {"data": {"validation_fraction": 1}},
        {"model": {"trainable_blocks": "al"}},
        {"run": {"overwrite": "maybe"}},
        {"engine": {"zero_stage": 4}},
    ],
)
def test_schema_refuses_what_the_program_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(wrong)


def test_schema_and_page_explain_every_setting() -> None:
    sections = {section: model.__name__ for section, (model, _) in all_sections().items()}
    for key, setting in all_settings().items():
        entry = json_schema()["$defs"][sections[setting.section]]["properties"][setting.name]
        assert entry["description"] == setting.help
        assert (entry["resume"], entry["sweep"], entry["level"]) == (setting.resume, setting.sweep, setting.level)
        assert settings_page().count(f"`{key}`") >= 1, key


def test_settings_page_of_the_documents_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page() + "\n", "write it again with: make docs"
