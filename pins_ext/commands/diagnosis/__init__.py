"""The parts of `pins-ext diagnose`: the run that is watched, its summary, files and picture."""
