# SPDX-License-Identifier: Apache-2.0
"""A prompt in, the ids that a model reads before its answer out.

`render` fills a chat template as `transformers` does, in a sandbox: templates are code from
strangers. `prompt_ids` turns a prompt into ids for one side; each side has its own template,
or none. Tools and documents are not passed to templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import Tokenizer

from minigold.sandbox import compiled

__all__ = ["Message", "Reader", "prompt_ids", "render"]

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message


class Reader(Protocol):
    """What is asked of a model here; `load.LanguageModel` is one."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> str | None: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
) -> str:
    r"""The text of a conversation, as `apply_chat_template` of `transformers` writes it.

    Args:
        messages: plain JSON data; keys whose value is None are left out.
        bos_token, eos_token: "" where the tokenizer has none.
        add_generation_prompt: end with what opens an answer.

    Raises:
        ValueError: no messages, or none that JSON can hold; the template does not parse, refuses
            the messages, or leaves the sandbox; or jinja2 is not installed.

    >>> turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    >>> render(turns, [{"role": "user", "content": "Hi"}], bos_token="", eos_token="")
    'user: Hi\n'
    """
    _check_jinja2()
    if not messages:
        raise ValueError("expected at least one message for the chat template, got none; add one")
    chat = [_with_reasoning(_plain(message)) for message in messages]
    try:
        text: str = _compiled(template)(
            messages=chat,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{k: v for k, v in (("bos_token", bos_token), ("eos_token", eos_token)) if v},
        )
    except Exception as error:  # a template is code: it can raise anything
        reason = " ".join(str(error)[:300].split()) or type(error).__name__
        raise ValueError(
            f"expected messages that the chat template can render, got {reason!r} from it; change "
            "the messages, or use --plain-prompt"
        ) from error
    return text


def prompt_ids(
    model: Reader, prompt: str | Sequence[Mapping[str, Any]], *, plain: bool
) -> list[int]:
    """The ids of a prompt, up to where the answer begins.

    Args:
        prompt: text (with a template: one user message), or a list of messages.
        plain: the text as it is, after the tokenizer's own leading special tokens (BOS).

    Raises:
        ValueError: messages with `plain`, no template without `plain`, no tokens at all, or an id
            that the model has no embedding for.
    """
    if plain:
        if not isinstance(prompt, str):
            raise ValueError(
                f"expected text for {model.name} with --plain-prompt, got {len(prompt)} messages; "
                "give the prompt as text, or use a model with a chat template"
            )
        ids = _plain_ids(model.tokenizer, prompt)
    elif model.template is None:
        raise ValueError(
            f"expected a chat template for {model.name}, got none; use --plain-prompt, or "
            "--student-plain or --teacher-plain for one side"
        )
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = render(
            model.template, messages, bos_token=model.bos_token, eos_token=model.eos_token
        )
        ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    _check_ids(model, ids)
    return ids


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's ids after the special tokens that the tokenizer puts first; none at the end."""
    probe = tokenizer.encode("a" + text, add_special_tokens=True)
    leading = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
    return [*probe.ids[:leading], *tokenizer.encode(text, add_special_tokens=False).ids]


def _check_ids(model: Reader, ids: Sequence[int]) -> None:
    if not ids:
        raise ValueError(
            f"expected a prompt of at least one token for {model.name}, got none; "
            "the prompt is empty and the tokenizer has no BOS"
        )
    beyond = [i for i in ids if i >= model.n_tokens]
    if beyond:
        raise ValueError(
            f"expected ids below {model.n_tokens} in a prompt for {model.name}, got {beyond[0]} "
            f"({model.tokenizer.id_to_token(beyond[0])!r}), which has no embedding; "
            "leave that text out of the prompt"
        )


def _with_reasoning(message: Mapping[str, Any]) -> Message:
    """Keys with a value; a message's reasoning under the names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _plain(message: Mapping[str, Any]) -> Message:
    """A copy made of JSON types only, so that a template reaches no method of ours."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"expected messages to be objects with role and content, got {type(message).__name__}; "
            "give text as a prompt, or make it a message"
        )
    try:
        plain: Message = json.loads(json.dumps(dict(message)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "expected messages of text, numbers, lists and objects, got one that JSON cannot hold "
            f"({error}); convert it first"
        ) from error
    return plain


def _check_jinja2() -> None:
    try:
        import jinja2
    except ImportError as error:
        raise ValueError(
            "expected jinja2 for chat templates, it is not installed; run: pip install jinja2, "
            "or use --plain-prompt"
        ) from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise ValueError(
            "expected jinja2 3.1.6 or later, as older sandboxes leak, got "
            f"{jinja2.__version__}; run: pip install -U jinja2"
        )


@lru_cache(maxsize=16)
def _compiled(template: str) -> Callable[..., str]:
    return compiled(template)
