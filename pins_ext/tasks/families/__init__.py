"""Kinds of task: what goes into the model, and which metric comes out."""
