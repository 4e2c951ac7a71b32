"""A loop that needs no room for gradients: each is used and freed inside backward.

python -m pins_ext.examples.release_loop
"""

from itertools import chain, islice, repeat

import torch
from torch.utils.data import DataLoader

import pins_ext
from pins_ext.examples.passages import load

STEPS = 200


def main() -> None:
    """Train, prune to 80 %, evaluate."""
    torch.manual_seed(0)
    train, validation, collate, model, majority = load()
    optimizer = pins_ext.optim.PinsAdamW(model.parameters(), lr=2e-3)
    optimizer.release_gradients(max_norm=1.0)  # by the norm of the step before
    pruner = pins_ext.Pruner(model, optimizer, pins_ext.PruneConfig(sparsity=0.8), total_steps=STEPS)

    batches = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(batches)), STEPS), 1):
        loss = model(**batch).loss
        loss.backward()  # importance, update and mask of every parameter
        there = sum(p.grad is not None for p in model.parameters())
        optimizer.step()  # ends the step
        if step % 40 == 1:
            sparsity = pruner.stats()["sparsity"]
            print(f"step {step:3d}  loss {loss.item():.3f}  sparsity {sparsity:.4%}  gradients left: {there}")

    final = pruner.finalize()  # exactly 80 %, verified
    print(f"{final['zeros']:,} of {final['weights']:,} weights are zero: sparsity {final['sparsity']:.4%}")

    model.eval()
    with torch.no_grad():
        right = [
            model(**batch).logits.argmax(-1) == batch["labels"]
            for batch in DataLoader(validation, batch_size=64, collate_fn=collate)
        ]
    print(f"accuracy {torch.cat(right).float().mean():.4f}; a constant answer has {majority:.4f}")


if __name__ == "__main__":
    main()
