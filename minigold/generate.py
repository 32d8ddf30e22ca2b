# SPDX-License-Identifier: Apache-2.0
"""A model and prompts in, its answers as text out: while they are written, or as lines of a file.

Where it stands: beside the loop, which has its own way to sample (`rollout.py`). The lines are a
prompts file again: what a teacher wrote can be trained on with `--lmbda 0`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from minigold.data import Prompt
from minigold.load import LanguageModel
from minigold.offsets import text_of_ids, vocabulary
from minigold.sample import Completion, sample

__all__ = ["Utterance", "completed", "said", "stream", "text_of", "write"]


class Utterance:
    """Text of ids that come one by one, never with half a character.

    What `add` and `close` gave, end to end, is `offsets.text_of_ids` of all ids.

    Raises:
        ValueError: the bytes of the tokenizer's ids are not known, see `offsets.spans_of_ids`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        text_of_ids(tokenizer, [])  # refuses such a tokenizer
        self.token_bytes = vocabulary(tokenizer).token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """What can be told now; the begin of a character waits for its rest."""
        return self.decoder.decode(self.token_bytes[token])

    def close(self) -> str:
        """U+FFFD for a character that was begun, else nothing."""
        return self.decoder.decode(b"", final=True)


def said(completion: Completion) -> list[int]:
    """The ids without the one that ended the answer."""
    return completion.ids[:-1] if completion.finished else completion.ids


def stream(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    say: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Completion:
    """Samples one answer and says its text while it comes: each token on a CPU, 16 on a GPU.

    Raises:
        ValueError: see `sample.sample` and `Utterance`.
    """
    text, ended = Utterance(model.tokenizer), False

    def watch(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
        nonlocal ended
        for token in ids_N.tolist():
            ended = ended or token in model.eos_ids  # on a GPU more tokens may follow it
            if not ended:
                say(text.add(token))
        return logits_NV[:, :0]

    (done,) = sample(
        model.decoder, [prompt_ids], max_new_tokens=max_new_tokens, eos_ids=model.eos_ids,
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, watch=watch,
    )  # fmt: skip
    say(text.close())
    return done


def write(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of `completed` for all prompts in their order, a batch at a time.

    Raises:
        ValueError: see `sample.sample` and `Utterance`.
    """
    for start in range(0, len(prompts), batch_size):
        some = slice(start, start + batch_size)
        found = sample(
            model.decoder, prompt_ids[some], max_new_tokens=max_new_tokens, eos_ids=model.eos_ids,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seeds[some],
        )  # fmt: skip
        yield [
            completed(prompt, text_of(model.tokenizer, one), finished=one.finished)
            for prompt, one in zip(prompts[some], found, strict=True)
        ]


def text_of(tokenizer: Tokenizer, completion: Completion) -> str:
    """The answer's text; if it was cut off inside a character, without that character."""
    text = Utterance(tokenizer)
    parts = [text.add(token) for token in said(completion)]
    return "".join(parts) + text.close() * completion.finished


def completed(prompt: Prompt, completion: str, *, finished: bool) -> dict[str, Any]:
    """The prompt's line of a prompts file with another completion."""
    row = {
        "prompt": prompt.prompt,
        "completion": completion,
        "finished": finished,
        "teacher_prompt": prompt.teacher_prompt,
        "answer": prompt.answer,
    }
    return {key: value for key, value in row.items() if value is not None} | prompt.extra
