"""LoRA over a frozen base that is pruned below it: exact importance of every base weight, one gradient at a time.

python -m pins_ext.examples.frozen_base     (needs peft)
"""

from itertools import chain, islice, repeat

import peft
import torch
from torch.utils.data import DataLoader

import pins_ext
from pins_ext.examples.passages import load

STEPS = 150


def main() -> None:
    """Train a dense model, freeze it, prune it to 80 % while adapters learn, merge them, evaluate."""
    torch.manual_seed(0)
    train, validation, collate, model, majority = load()
    batches = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    dense = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in islice(chain.from_iterable(repeat(batches)), STEPS):
        dense.zero_grad()
        model(**batch).loss.backward()
        dense.step()

    lora = peft.LoraConfig(r=8, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
    config = pins_ext.PruneConfig(sparsity=0.8, criterion="platon")  # pins is platon where nothing moves
    pruner = pins_ext.Pruner(adapted, optimizer, config, total_steps=STEPS, frozen_base=True)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(batches)), STEPS), 1):
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 1:
            print(f"step {step:3d}  loss {loss.item():.3f}  sparsity {pruner.stats()['sparsity']:.4%}")
    final = pruner.finalize()  # exactly 80 % of the base
    pruner.detach()

    merged = pins_ext.merge_lora(adapted)  # a plain merge would fill the zeros
    print(f"{final['zeros']:,} of {final['weights']:,} base weights are zero: sparsity {final['sparsity']:.4%}")
    print(f"the merge keeps {merged.zeros:,} of them in the adapted layers, {merged.refilled:,} would be filled")
    right = [
        merged.model.eval()(**batch).logits.argmax(-1) == batch["labels"]
        for batch in DataLoader(validation, batch_size=64, collate_fn=collate)
    ]
    print(f"accuracy {torch.cat(right).float().mean():.4f}; a constant answer has {majority:.4f}")


if __name__ == "__main__":
    main()
