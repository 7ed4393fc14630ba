"""One run, from set-up to results: configuration to objects, directory, attempts, resume, status.

Re-exports nothing: `restart_policy` and `status` must not load torch.
"""
