"""A stock Hugging Face Trainer, pruned by one line more.

python -m pins_ext.examples.trainer
"""

import tempfile

import numpy as np
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

import pins_ext
from pins_ext.examples.passages import load
from pins_ext.integrations.transformers import PinsCallback


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the validation passages whose area is right."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, prune to 80 %, evaluate, save, load again without pins_ext."""
    set_seed(0)
    train, validation, collate, model, majority = load()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=200,
                per_device_train_batch_size=16,
                learning_rate=2e-3,
                lr_scheduler_type="constant",
                logging_steps=40,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=accuracy,
            callbacks=[PinsCallback(pins_ext.PruneConfig(sparsity=0.8))],  # the line
        )
        trainer.train()
        score = trainer.evaluate()["eval_accuracy"]
        trainer.save_model(folder)
        saved = type(model).from_pretrained(folder)
    weights = [p for name, p in saved.named_parameters() if ".layer." in name and p.dim() == 2]
    zeros, n = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
    print(f"{zeros:,} of {n:,} saved weights are zero: sparsity {zeros / n:.4%}")
    print(f"accuracy {score:.4f}; a constant answer has {majority:.4f}")


if __name__ == "__main__":
    main()
