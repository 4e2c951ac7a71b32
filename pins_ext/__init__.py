"""Iterative global pruning of pretrained language models during fine-tuning, exactly (PINS, Ren & Zhu 2023)."""

__version__ = "0.1.0"
