"""Files that appear whole or not at all, locks, free space, where caches are. Knows no torch."""
