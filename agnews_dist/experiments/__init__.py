"""Many trainings or fits on one set of features: sweeps, ensembles, probes, cleaning."""
