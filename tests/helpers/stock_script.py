"""Fine-tunes a text classifier the way transformers' own run_glue.py does it. One line is about pruning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from pins_ext import PruneConfig
from pins_ext.integrations.transformers import PinsCallback

CONFIG = PruneConfig(sparsity=0.75, delta_t=2, warmup=2, cooldown=4)


@dataclass
class DataTrainingArguments:
    """What is trained on."""

    train_file: str = field(metadata={"help": "CSV with the columns text and label"})
    validation_file: str = field(metadata={"help": "the same"})
    max_seq_length: int = field(default=32, metadata={"help": "in tokens"})


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "folder or hub name"})
    cache_dir: str | None = field(default=None, metadata={"help": "where data sets are kept"})


def main(argv: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """Train, save and evaluate."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(list(argv))
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw_datasets = load_dataset("csv", data_files=files, cache_dir=model_args.cache_dir)
    label_list = sorted(raw_datasets["train"].unique("label"))
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
    label_to_id = {label: i for i, label in enumerate(label_list)}

    def preprocess_function(examples):
        result = tokenizer(examples["text"], max_length=data_args.max_seq_length, truncation=True)
        result["labels"] = [label_to_id[label] for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(
            preprocess_function, batched=True, remove_columns=raw_datasets["train"].column_names
        )

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"],
        eval_dataset=raw_datasets["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[PinsCallback(CONFIG), *callbacks],  # the one line
    )
    if training_args.do_train:
        last = get_last_checkpoint(training_args.output_dir)
        train_result = trainer.train(resume_from_checkpoint=True if last else None)
        trainer.save_model()
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
