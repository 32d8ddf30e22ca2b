# SPDX-License-Identifier: Apache-2.0
"""Templates are filled as `transformers` fills them and stay in their sandbox; ids of a prompt."""

import copy
import sys
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minigold.chat import prompt_ids, render
from strategies import texts
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe, unigram, wordpiece

TEMPLATES = {
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Qwen3": """
{%- if tools %}
    {{- '<tools>' + tools | tojson + '</tools>' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}
        {%- set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
        {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "Llama 3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- message.tool_calls[0].function.arguments | tojson }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "Gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
""",
    "Mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}"
    ),
    "generation": """
{% set label = 'outside' %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
        {% set label = 'inside' %}
        {{ label }}: {{ message.content }} ({{ loop.index }})
        {% endgeneration %}
    {% else %}
    {{ label }}: {{ message.content }}
    {% endif %}
    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ eos_token }}{% endif %}
""",
    "tojson": (
        "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}\n"
        "{{ messages | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}"
    ),
    "gpt-oss": """
{%- macro turn(role, text) -%}
<|start|>{{ role }}<|message|>{{ text }}<|end|>
{%- endmacro -%}
{%- set seen = dict(n=0) -%}
{%- for m in messages -%}
    {%- if 'thinking' in m and m.thinking -%}
        {{ turn('analysis', m.thinking) }}
    {%- endif -%}
    {{ turn(m.role, m.get('content', '') or 'nothing') }}{# a comment #}
    {%- for key, value in m.items() | sort %} {{ key }}={{ value }}{% endfor %}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
{{ seen.n }} {{ tools }} {{ documents }} {{ 'unset' if pad_token is not defined else pad_token }}
""",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "What is 12 + 30?"}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello."},
    ],
    "many turns": [
        {"role": "user", "content": "  one "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ],
    "many scripts": [
        {"role": "user", "content": "🙂👩‍👩‍👧‍👦 你好，世界。 مرحبا नमस्ते e\u0301 \u2028 \ufeff"},
        {"role": "assistant", "content": "東京都 𝒳 \x00"},
        {"role": "user", "content": "<b>&\"quoted\" 'it' \\ {{ 7 * 7 }} {% raw %}</b>"},
    ],
    "nothing": [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": None, "reasoning_content": None},
    ],
    "reasoning": [
        {"role": "user", "content": "12 * 3?"},
        {"role": "assistant", "content": "36", "reasoning_content": "三十六\n"},
    ],
    "reasoning by older names": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "c", "thinking": None},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e", "thinking": "f", "reasoning": "g"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]}
    ],
    "tool calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"arguments": {"city": "Zürich", "n": 1}}}],
        },
        {"role": "tool", "content": "1.5", "ok": True, "score": 0.25},
    ],
    "two tool calls": [{"role": "assistant", "tool_calls": [{}, {}]}],
    "no role": [{"content": "x"}],
}
TALK = CONVERSATIONS["one turn"]


@lru_cache(maxsize=1)
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_bpe(), bos_token="<s>", eos_token="</s>"
    )


def by_transformers(template: str, messages: list[dict[str, Any]], *, add: bool) -> str | None:
    """What `transformers` writes; None where it refuses."""
    try:
        return reference().apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add
        )
    except (jinja2.TemplateError, TypeError):
        return None


def filled(template: str, messages: Any = TALK, *, add: bool = True) -> str:
    return render(template, messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=add)


# -------------------------------------------------------------------------------- render
@pytest.mark.parametrize("add", [True, False], ids=["asking", "told"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_filled_as_transformers_does(
    template: str, conversation: str, add: bool
) -> None:
    messages = copy.deepcopy(CONVERSATIONS[conversation])
    expected = by_transformers(TEMPLATES[template], messages, add=add)
    if expected is None:
        with pytest.raises(ValueError, match=r"that the chat template can render, got ['\"]"):
            filled(TEMPLATES[template], messages, add=add)
    else:
        assert filled(TEMPLATES[template], messages, add=add) == expected
    assert messages == CONVERSATIONS[conversation]


def test_the_conversations_try_each_template() -> None:
    for name, template in TEMPLATES.items():
        written = {by_transformers(template, c, add=True) for c in CONVERSATIONS.values()}
        assert len(written - {None}) >= 4, name
    assert by_transformers(TEMPLATES["Gemma"], CONVERSATIONS["system"], add=True) is None
    assert "inside: Hello." in filled(TEMPLATES["generation"], CONVERSATIONS["system"])
    assert "三十六" in filled(TEMPLATES["Qwen3"], CONVERSATIONS["reasoning"])
    assert "<|start|>analysis<|message|>c<|end|>" in filled(
        TEMPLATES["gpt-oss"], CONVERSATIONS["reasoning by older names"]
    )


@pytest.mark.parametrize(
    "path",
    sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")),
    ids=lambda p: p.stem,
)
def test_templates_of_real_models_are_filled_as_transformers_does(path: Path) -> None:
    template = path.read_text("utf-8")
    for name in ("one turn", "system", "many turns", "reasoning", "tool calls"):
        messages = CONVERSATIONS[name]
        try:
            expected = by_transformers(template, copy.deepcopy(messages), add=True)
        except (ValueError, KeyError):
            expected = None
        try:
            found = filled(template, messages)
        except ValueError:
            found = None
        assert found == expected, name


@given(
    template=st.sampled_from(list(TEMPLATES.values())),
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system"]), texts(4)), min_size=1
    ),
    add=st.booleans(),
)
def test_any_text_is_filled_in_as_transformers_does(
    template: str, turns: list[tuple[str, str]], add: bool
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = by_transformers(template, messages, add=add)
    if expected is not None:
        assert filled(template, messages, add=add) == expected
        return
    with pytest.raises(ValueError, match="that the chat template can render"):
        filled(template, messages, add=add)


def test_tokens_that_a_tokenizer_lacks_are_undefined() -> None:
    template = "{{ bos_token is defined }} {{ eos_token is defined }}{{ bos_token }}"
    assert render(template, TALK, bos_token="", eos_token="</s>") == "False True"


def test_texts_of_other_types_become_plain() -> None:
    class Role(str, Enum):  # noqa: UP042 (its str() is not its value, unlike that of StrEnum)
        USER = "user"

    class Text(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "another"

    template = "{{ messages[0].role }}: {{ messages[0].content }} {{ messages[0].parts }}"
    message = {"role": Role.USER, "content": Text("Hi"), "parts": (1, True, 0.5, None)}
    assert filled(template, [message]) == "user: Hi [1, True, 0.5, None]"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''['__class__'].x }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ (''|attr('__class__')).x }}", "'__class__' of 'str' object is unsafe"),
        ("{{ '{0.__class__.x}'.format('') }}", "attribute 'format' of 'str' object is unsafe"),
        ("{{ raise_exception.__globals__.sys }}", "attribute '__globals__' of 'function'"),
        ("{{ strftime_now.__code__.co_consts }}", "attribute '__code__' of 'function'"),
        ("{{ lipsum.__globals__['os'] }}", "'lipsum' is undefined"),
        ("{{ self.__init__.__globals__ }}", "attribute '__init__' of 'TemplateReference'"),
        ("{{ cycler.__init__.__globals__ }}", "attribute '__init__' of 'type'"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(role='x') }}", "attribute 'update' of 'dict' object is unsafe"),
        ("{{ messages[0].pop('role') }}", "attribute 'pop' of 'dict' object is unsafe"),
        ("{{ dict.update(messages[0], role='x') }}", "has no attribute 'update'"),
        ("{{ range(100001) | list }}", "Range too big"),
        ("{% include 'secrets' %}", "no loader"),
        ("{{ 'x' * 1000000000000000 }}", "values of more than 4,194,304 characters"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ 1 % 0 }}", "division or modulo by zero|modulo by zero"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% if %}", "Expected an expression"),
        ("{% generation %}x", "Unexpected end of template"),
        ("{{ messages[7].role }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ unknown.attribute }}", "'unknown' is undefined"),
    ],
    ids=lambda value: value[:32],
)
def test_templates_that_leave_the_sandbox_or_fail_are_refused(template: str, reason: str) -> None:
    messages = copy.deepcopy(TALK)
    pattern = rf"expected messages that the chat template can render, got .*({reason}).* from it; "
    with pytest.raises(ValueError, match=pattern) as caught:
        filled(template, messages)
    assert "\n" not in str(caught.value)
    assert messages == TALK


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message for the chat template, got none"),
        (["Hi"], "objects with role and content, got str; give text as a prompt"),
        (
            [{"role": "user", "content": {1, 2}}],
            r"got one that JSON cannot hold \(Object of type set",
        ),
        ([{"role": "user", "content": object()}], "Object of type object is not JSON serializable"),
    ],
)
def test_messages_that_are_no_json_are_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        filled(TEMPLATES["SmolLM2"], messages)


def test_messages_nested_too_deep_are_refused() -> None:
    content: list[Any] = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(ValueError, match=r"got one that JSON cannot hold .*recursion"):
        filled(TEMPLATES["Gemma"], [{"role": "user", "content": content}])


def test_without_jinja2_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(jinja2, "__version__", "3.1.5")
        with pytest.raises(ValueError, match=r"jinja2 3\.1\.6 or later, .* got 3\.1\.5; run: pip"):
            filled(TEMPLATES["SmolLM2"])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="not installed; run: pip install jinja2, or use --plain"):
        filled(TEMPLATES["SmolLM2"])


# ------------------------------------------------------------------------ ids of a prompt
@dataclass
class Side:
    tokenizer: Tokenizer
    template: str | None = None
    n_tokens: int = 10**6
    name: str = "tiny"
    bos_token: str = "<s>"
    eos_token: str = "</s>"


@lru_cache(maxsize=1)
def framed() -> Tokenizer:
    """SentencePiece whose post-processor writes BOS in front and EOS behind."""
    tokenizer = Tokenizer.from_str(sentencepiece_bpe().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@lru_cache(maxsize=1)
def without_letters() -> Tokenizer:
    """Digits only: other characters vanish, and BOS stands in front."""
    vocab = {"<s>": 0, **{str(i): i + 1 for i in range(10)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "front"),
    [
        (framed, ["<s>"]),
        (sentencepiece_bpe, ["<s>"]),
        (wordpiece, ["[CLS]"]),
        (without_letters, ["<s>"]),
        (unigram, []),
        (byte_bpe, []),
    ],
)
@pytest.mark.parametrize("text", ["12 + 30 = 42", " the 8th fox", "7"])
def test_a_plain_prompt_has_bos_in_front_and_no_eos_behind(
    make: Any, front: list[str], text: str
) -> None:
    tokenizer = make()
    ids = prompt_ids(Side(tokenizer), text, plain=True)
    body = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [tokenizer.token_to_id(token) for token in front] + body
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    theirs = fast(text, return_token_type_ids=False)["input_ids"]
    assert ids == theirs[: len(ids)]


@given(texts())
def test_any_plain_prompt_has_bos_once(text: str) -> None:
    tokenizer = framed()
    ids = prompt_ids(Side(tokenizer), text, plain=True)
    assert ids == [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert ids.count(1) == 1 + text.count("<s>")


def test_an_empty_plain_prompt_is_bos_alone() -> None:
    assert prompt_ids(Side(framed()), "", plain=True) == [1]
    with pytest.raises(ValueError, match="at least one token for tiny, got none; the prompt is em"):
        prompt_ids(Side(byte_bpe()), "", plain=True)


@pytest.mark.parametrize("make", [framed, sentencepiece_bpe])
@pytest.mark.parametrize("template", ["Llama 3", "Gemma", "Mistral", "SmolLM2"])
def test_a_template_writes_bos_itself_and_no_other_is_added(template: str, make: Any) -> None:
    side = Side(make(), TEMPLATES[template])
    messages = CONVERSATIONS["many turns"][:3]
    ids = prompt_ids(side, messages, plain=False)
    assert ids.count(1) == (template != "SmolLM2")
    theirs = reference().apply_chat_template(
        messages, chat_template=side.template, add_generation_prompt=True, return_dict=False
    )
    assert ids == theirs


def test_text_with_a_template_is_one_user_message() -> None:
    side = Side(byte_bpe(), TEMPLATES["SmolLM2"])
    told = [{"role": "user", "content": "Hi"}]
    ids = prompt_ids(side, "Hi", plain=False)
    assert ids == prompt_ids(side, told, plain=False)
    written = side.tokenizer.decode(ids, skip_special_tokens=False)
    assert written.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("side", "prompt", "plain", "message"),
    [
        (Side(byte_bpe(), "x"), TALK, True, "expected text for tiny with --plain-prompt, got 1 mess"),
        (Side(byte_bpe()), "Hi", False, "expected a chat template for tiny, got none; use --plain"),
        (Side(byte_bpe(), "{{ bos }}"), "Hi", False, "at least one token for tiny, got none"),
        (Side(byte_bpe(), "x"), [], False, "at least one message"),
        (Side(byte_bpe(), n_tokens=3), "<|im_end|>a", True, r"ids below 3 in a prompt for tiny, got \d"),
        (Side(byte_bpe(), "<think>", n_tokens=500), "", False, r"got 500 \('<think>'\), which has no"),
    ],
)  # fmt: skip
def test_prompts_that_a_model_cannot_read_are_refused(
    side: Side, prompt: Any, plain: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_ids(side, prompt, plain=plain)
