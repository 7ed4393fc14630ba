"""Sinks of events (console, run log) and the files a run leaves (result, predictions, model card)."""
