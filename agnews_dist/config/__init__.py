"""Every setting: its schema, YAML files, the command line, and the frame around every command."""
