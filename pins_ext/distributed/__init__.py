"""Pruning over several processes, on torch.distributed: where a DTensor's shard lies, and the few collectives."""
