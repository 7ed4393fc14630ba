"""Checks of machine, disks and network before a job: `rendezvous_check` by itself, the rest for `doctor`."""
