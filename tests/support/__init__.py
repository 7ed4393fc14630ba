"""Helpers that tests share: processes, fault injection, small models and runs."""
