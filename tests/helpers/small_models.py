"""Tiny folders of models and tokenizers for the tests of the task families."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = 64


def word_pieces(max_length: int = PLACES) -> PreTrainedTokenizerFast:
    """Splits every word into its letters, as WordPiece does: "cab" is c ##a ##b. Inputs begin with [CLS]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", "?"]
    model = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=max_length, **special)


def characters() -> PreTrainedTokenizerFast:
    """A token per byte, an end-of-text token, no padding token: GPT-2's way."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", model_max_length=PLACES)


def encoder_folder(folder: Path) -> Path:
    """A pretrained tiny BERT without a head, and its tokenizer."""
    tokenizer = word_pieces()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=PLACES, **sizes)).save_pretrained(folder)
    return folder


def decoder_config() -> GPT2Config:
    """That of a tiny GPT-2."""
    return GPT2Config(
        vocab_size=257, n_positions=PLACES, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )


def decoder_folder(folder: Path) -> Path:
    """Config and tokenizer of a tiny GPT-2, no weights."""
    characters().save_pretrained(folder)
    decoder_config().save_pretrained(folder)
    return folder


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=72, num_labels=3)).eval()
