"""A Llama-style model under FSDP2, pruned by the same two lines: every rank runs this script.

torchrun --nproc-per-node 2 -m pins_ext.examples.fsdp_loop
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import pins_ext

STEPS = 30


def main() -> None:
    """Train on a sequence that repeats, prune to 80 %, say what is there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    model.to(device)

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = pins_ext.optim.PinsAdamW(model.parameters(), lr=3e-3)  # any torch optimizer will do
    pruning = pins_ext.PruneConfig(sparsity=0.8, delta_t=3, min_density=0.05)  # of every tensor
    pruner = pins_ext.Pruner(model, optimizer, pruning, total_steps=STEPS)

    for step in range(STEPS):
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
        tokens = (torch.randint(256, (8, 1), device=device) + torch.arange(24, device=device)) % 256
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            sparsity = pruner.stats()["sparsity"]  # every rank asks
            if dist.get_rank() == 0:
                print(f"step {step + 1:3d}  loss {loss.item():.3f}  sparsity {sparsity:.4%}")

    final = pruner.finalize()  # exactly 80 % over all ranks, verified
    if dist.get_rank() == 0:
        print(f"{final['zeros']:,} of {final['weights']:,} weights are zero: sparsity {final['sparsity']:.4%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
