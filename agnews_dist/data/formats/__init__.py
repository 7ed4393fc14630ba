"""Readers of tables: csv, tsv, jsonl, json, parquet, arrow, text files, and data sets of the `datasets` library."""
