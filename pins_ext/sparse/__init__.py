"""A pruned model that is smaller on disk and faster to run: its file format and its CPU runtime."""
