"""In what importance states and moments can be stored, by name: known before torch is loaded."""

STORAGES = ("float32", "bfloat16", "8bit")
"""bfloat16 is half of float32; 8bit, a byte each and a scale for every 32 weights, a quarter."""
