"""A grid of training runs and what it shows: the grid, its cells, running them, tables, overlap of masks, pictures."""
