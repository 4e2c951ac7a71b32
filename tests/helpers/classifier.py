"""A tiny pretrained model, labelled files and a short run on them: shared by the tests of the command."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "bad", "odd", "film", "book", "day", "very", "a", "the", "was"]


def make_tiny(root: Path) -> Path:
    """A folder with a pretrained tiny BERT (no classifier yet) and three labelled files."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        root / "model"
    )
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(root / "model")
    for name, n in (("train", 60), ("dev", 18), ("test", 12)):
        rows = [f"{WORDS[i % 3]} {WORDS[3 + i % 7]} {WORDS[5 + i % 5]},{'yes' if i % 3 else 'no'}" for i in range(n)]
        (root / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return root


def flags(tiny: Path, output: Path, *more: str) -> list[str]:
    """A run of twelve steps, checkpoints every third, that prunes from the third step on."""
    files = ["--train-file", f"{tiny}/train.csv", "--validation-file", f"{tiny}/dev.csv"]
    length = ["--max-steps", "12", "--save-steps", "3", "--eval-steps", "6", "--logging-steps", "2", "--use-cpu"]
    pruning = ["--sparsity", "0.75", "--delta-t", "2", "--learning-rate", "1e-3", "--per-device-train-batch-size", "8"]
    return ["--model", f"{tiny}/model", *files, *length, *pruning, "--output-dir", str(output), *more]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
