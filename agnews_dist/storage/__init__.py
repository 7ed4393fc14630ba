"""Files and directories: atomic publishing, locks, free space. Knows no torch."""
