"""Files that are whole or absent: atomic writes, tensors without pickles, the state of random generators."""
