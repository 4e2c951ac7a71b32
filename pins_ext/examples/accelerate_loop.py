"""A loop with accelerate, in one process or several: each has the same masks after every step.

accelerate launch -m pins_ext.examples.accelerate_loop
accelerate launch --multi_gpu --num_processes 2 -m pins_ext.examples.accelerate_loop   (CPUs: ACCELERATE_USE_CPU=true)
"""

from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import pins_ext
from pins_ext.examples.passages import load

STEPS = 160


def main() -> None:
    """Train, prune to 80 %, evaluate."""
    set_seed(0)
    accelerator = Accelerator()
    train, validation, collate, model, majority = load()
    batches = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    held_out = DataLoader(validation, batch_size=64, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, batches, held_out = accelerator.prepare(model, optimizer, batches, held_out)
    config = pins_ext.PruneConfig(sparsity=0.8)
    pruner = pins_ext.Pruner(accelerator.unwrap_model(model), optimizer, config, total_steps=STEPS)

    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(batches)), STEPS), 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 1:
            accelerator.print(f"step {step:3d}  loss {loss.item():.3f}  sparsity {pruner.stats()['sparsity']:.4%}")
    final = pruner.finalize()

    model.eval()
    right = []
    with torch.no_grad():
        for batch in held_out:
            found = model(**batch).logits.argmax(-1) == batch["labels"]
            right.append(accelerator.gather_for_metrics(found))
    accelerator.print(f"{final['zeros']:,} of {final['weights']:,} weights are zero: sparsity {final['sparsity']:.4%}")
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.4f}; a constant answer has {majority:.4f}")
    accelerator.wait_for_everyone()  # before the first one closes its connections
    # DistributedDataParallel first: were it the last to hold its connections, closing them could wait for ever.
    del pruner, model
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
