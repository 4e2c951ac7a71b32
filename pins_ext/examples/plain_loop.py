"""A PyTorch training loop, pruned by two lines more.

python -m pins_ext.examples.plain_loop
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
    optimizer = pins_ext.optim.PinsAdamW(model.parameters(), lr=2e-3)  # any torch optimizer will do
    pruner = pins_ext.Pruner(model, optimizer, pins_ext.PruneConfig(sparsity=0.8), total_steps=STEPS)  # first line

    batches = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(batches)), STEPS), 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 40 == 1:
            print(f"step {step:3d}  loss {loss.item():.3f}  sparsity {pruner.stats()['sparsity']:.4%}")

    final = pruner.finalize()  # second line: exactly 80 %, verified
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
