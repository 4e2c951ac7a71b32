"""Texts through a model: what it says of each, for the kinds of head that `pins-ext train` trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

KINDS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "entities",
    "ForQuestionAnswering": "questions",
    "ForCausalLM": "generation",
    "LMHeadModel": "generation",
}
"""End of a model's class name -> what it does."""

MAX_ANSWER = 30
N_BEST = 20


class UnanswerableError(ValueError):
    """A model of a kind, or a request, that can't be answered."""


def kind_of(model: Any) -> str:
    """ "classification", "entities", "questions" or "generation".

    Raises:
        UnanswerableError: none of them.
    """
    name = type(model).__name__
    for end, kind in KINDS.items():
        if name.endswith(end):
            return kind
    raise UnanswerableError(f"{name} is none of the models that can be run: {', '.join(KINDS)}")


def answers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    max_new_tokens: int = 40,
) -> Iterator[dict[str, Any]]:
    """What the model says of each text, as plain data.

    Args:
        model: of one of `KINDS`.
        tokenizer: its tokenizer.
        texts: one by one; the contexts for questions.
        pairs: a second text for each, for tasks on pairs; the questions for questions.
        max_new_tokens: how much to generate, less where the model's positions end before.

    Yields:
        classification: {"label", "score"}, or {"value"} for regression. entities: {"entities": [{"label", "text",
        "start", "end", "score"}]}. questions: {"answer", "start", "end", "score"}. generation: {"text"}. Of a text that
        is longer than the model reads, classification and entities also have "cut_to", the tokens that were read.

    Raises:
        UnanswerableError: a kind that needs `pairs` without them, or the other way round; a text without tokens; one to
            go on from that fills the model's positions; a question that leaves its text no room.
    """
    kind = kind_of(model)
    if kind == "questions" and pairs is None:
        raise UnanswerableError("a model for questions needs a question for each text")
    if pairs is not None and kind in ("entities", "generation"):
        raise UnanswerableError(f"a model for {kind} takes one text at a time, no pairs")
    with torch.inference_mode():
        if kind == "entities":
            yield from _entities(model, tokenizer, texts)
        elif kind == "generation":
            yield from _generated(model, tokenizer, texts, max_new_tokens)
        else:
            for i, text in enumerate(texts):
                pair = None if pairs is None else pairs[i]
                if kind == "classification" or pair is None:
                    yield _classified(model, tokenizer, text, pair)
                else:
                    yield _answered(model, tokenizer, text, pair)


def _classified(model: Any, tokenizer: Any, text: str, pair: str | None) -> dict[str, Any]:
    longest = _longest(model, tokenizer)
    inputs = tokenizer(text, pair, truncation=True, max_length=longest, return_tensors="pt")
    cut = _cut(tokenizer, text, pair, longest, inputs["input_ids"].shape[1])
    logits = model(**_taken(model, inputs)).logits[0].float()
    if logits.numel() == 1:
        return {"value": float(logits[0])} | cut
    if model.config.problem_type == "multi_label_classification":
        scores = logits.sigmoid()
        return {"labels": {model.config.id2label[i]: float(s) for i, s in enumerate(scores)}} | cut
    scores = logits.softmax(0)
    best = int(scores.argmax())
    return {"label": model.config.id2label[best], "score": float(scores[best])} | cut


def _cut(tokenizer: Any, text: str, pair: str | None, longest: int | None, read: int) -> dict[str, int]:
    """{"cut_to": tokens that are read} of a text with more, {} of others.

    Raises:
        UnanswerableError: no token is read.
    """
    if read == 0:
        raise UnanswerableError("a text is empty: its tokenizer makes no tokens of it")
    if longest is None or read < longest or len(tokenizer(text, pair, verbose=False)["input_ids"]) <= longest:
        return {}
    return {"cut_to": read}


def _entities(model: Any, tokenizer: Any, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    from transformers import pipeline

    # Where nobody said how long a text may be, the pipeline would not cut it.
    longest = _longest(model, tokenizer)
    tokenizer.model_max_length = longest or tokenizer.model_max_length
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
    for text in texts:
        read = len(tokenizer(text, truncation=longest is not None, max_length=longest)["input_ids"])
        cut = _cut(tokenizer, text, None, longest, read)
        entities: list[Any] = tagger(text)
        yield {
            "entities": [
                {
                    "label": found["entity_group"],
                    "text": text[found["start"] : found["end"]],
                    "start": int(found["start"]),
                    "end": int(found["end"]),
                    "score": float(found["score"]),
                }
                for found in entities
            ]
        } | cut


def _answered(model: Any, tokenizer: Any, context: str, question: str) -> dict[str, Any]:
    """The likeliest span over all windows of the context (Devlin et al. 2019)."""
    from pins_ext.tasks.families.questions import best_span

    length = min(_longest(model, tokenizer) or 512, 512)
    stride = length // 4
    asked = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    if asked + tokenizer.num_special_tokens_to_add(pair=True) + stride >= length:
        raise UnanswerableError(f"a question has {asked} tokens, too many beside a text in {length}: shorten it")
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping")
    encoded.pop("overflow_to_sample_mapping")
    output = model(**_taken(model, encoded))
    best: tuple[float, int, int] | None = None
    for i in range(len(offsets)):
        inside = torch.tensor([part == 1 for part in encoded.sequence_ids(i)])
        places = torch.where(inside[:, None], offsets[i], -1).numpy()
        start, end = output.start_logits[i].float().numpy(), output.end_logits[i].float().numpy()
        span = best_span(start, end, places, N_BEST, MAX_ANSWER)
        if span is not None and (best is None or span[0] > best[0]):
            best = span
    if best is None:
        return {"answer": "", "start": 0, "end": 0, "score": float("-inf")}
    return {"answer": context[best[1] : best[2]], "start": best[1], "end": best[2], "score": best[0]}


def _generated(model: Any, tokenizer: Any, texts: Iterable[str], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    positions = _positions(model)
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        given = inputs["input_ids"].shape[1]
        if given == 0:
            raise UnanswerableError("a text is empty: a model for generation needs something to go on from")
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - given)
        if room < 1:
            raise UnanswerableError(f"a text has {given} tokens and the model {positions} positions: shorten the text")
        output = model.generate(**_taken(model, inputs), max_new_tokens=room, do_sample=False, pad_token_id=pad)
        yield {"text": tokenizer.decode(output[0, given:], skip_special_tokens=True)}


def _taken(model: Any, inputs: Any) -> dict[str, Any]:
    """Those of a tokenizer's outputs that the model reads: a generic one tells token types to any model."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _longest(model: Any, tokenizer: Any) -> int | None:
    """Tokens that the model reads, by its positions and its tokenizer; None where neither tells."""
    # Tokenizers say 10^30 where nobody said.
    told = [n for n in (_positions(model), tokenizer.model_max_length) if n is not None and n < 1 << 24]
    return min(told, default=None)


def _positions(model: Any) -> int | None:
    """Positions that the model has; None where its configuration tells none."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    # RoBERTa and its kin count positions from behind the padding's.
    tables = (m for name, m in model.named_modules() if name.endswith("embeddings.position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return most if padding is None else most - padding - 1
