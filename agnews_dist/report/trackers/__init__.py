"""Experiment trackers: each client runs in a process of its own, which follows events.jsonl."""
