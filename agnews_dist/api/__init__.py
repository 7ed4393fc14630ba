"""The package from Python: a whole training as a function, `fit` and `load` around it."""
