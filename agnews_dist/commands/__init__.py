"""The commands people type: each parses its options, calls the layers below, and prints."""
