"""Sinks of events, files that a run writes, and the output of commands."""
