"""One run: set up, directory, attempts, resume, status, results."""
