"""Every setting: schema, values, YAML files. Knows no torch and no command line."""
