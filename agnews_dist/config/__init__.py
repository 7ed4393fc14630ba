"""Every setting: schema and validation, YAML files, command line. Knows no torch."""
