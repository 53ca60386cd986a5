"""Chat templates against transformers' `apply_chat_template`: the same text and the same ids for every feature."""

from __future__ import annotations

import dataclasses
import json
import shutil
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE, render
from olmoe.errors import TokenizerError
from olmoe.hf.auto import AutoTokenizer
from olmoe.io.hub import SHIPPED
from olmoe.tokenizer import Tokenizer
from sentences import refused

# What released chat models do in their templates, and every feature of the environment on its own.
TEMPLATES = {
    "olmoe": None,
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token}}{% endif %}{% endfor %}",
    "llama": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if not m.tool_calls|length == 1 %}{{- raise_exception("Only single tool-calls!") }}{%- endif %}
        {{- m.tool_calls[0].function.arguments | tojson }}
    {%- elif m.role == "tool" %}{{- '<ipython>' + m.content }}
    {%- else %}{{- '<' + m['role'] + '>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
""",
    "qwen": """{%- set ns = namespace(last=messages|length - 1) %}
{%- if tools %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
    {{- message.role + ns.last|string + reasoning + content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}""",
    "tokens": "{{ tools is none }}|{{ documents is none }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token is defined }}"
    "|{{ eos_token == '<|endoftext|>' }}|{{ eos_token|length }}|{{ eos_token|upper }}|{{ add_generation_prompt }}",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.index0 == 3 %}{% break %}{% endif %}\n  {{ m.role }}{{ m.content }}\n{% endfor %}\n",
    "generation": "{% for m in messages %}{{ m.role }}\n{% generation %}\n{% set z = 1 %}{{ m.content }}"
    "{{ eos_token }}\n{% endgeneration %}\n{{ z is defined }}\n"
    "{%- generation -%} x {%- endgeneration -%}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ messages|tojson(sort_keys=true, ensure_ascii=true, separators=(',',':')) }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{{ c }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}",
    "documents": "{% for d in documents or [] %}{{ loop.index }} {{ d.title }}: {{ d['text'] }}\n{% endfor %}"
    "{{ messages[-1].content }}{{ documents|tojson }}",
    "macros": "{% macro w(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ w(m.content|default('none')) }}"
    "{% endfor %}{{ dict(a=1) }}{{ messages|map(attribute='role')|join(',') }}"
    "{{ messages|selectattr('role','equalto','user')|list|length }}",
    "escapes": "{{ '<>&\"' }}{{ {'b': '<b>é\u2028', 'A': [1,none,true]}|tojson }} {{ custom }} {{ date }}",
    "fields": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}",
    "blanks": "  {% if true %}\n    x {{ 1 }}   \n  {% endif %}\n\n{#- c -#}\n  y  {# z #}\n\n",
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'Wetter <in> é & "x"', "a": {"z": 1, "b": []}}}]
DOCUMENTS = [{"title": "T <1>", "text": "x"}, {"title": "B", "text": "y", "n": 3}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"z": "<é>", "a": 1}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1 "},
        {"role": "user", "content": " U2\n"},
        {"role": "assistant", "content": "A2  \n"},
    ],
    [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "22", "name": "f"},
        {"role": "assistant", "content": "It is 22."},
    ],
    [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "U <|endoftext|> x <|padding|> \ue0f0\ue0f1"},
        {"role": "assistant", "content": "A", "reasoning": "because", "thinking": None},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "part 1"}, {"type": "image", "n": True}]},
        {"role": "assistant", "content": [{"type": "text", "text": "go on "}]},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "日本語 😀 e\u0301"}],
]
OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False, "documents": DOCUMENTS, "custom": "é<", "date": 3},
    {"add_generation_prompt": True, "tools": TOOLS, "enable_thinking": False, "pad_token": "PP"},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": False, "continue_final_message": "reasoning_content"},
]


def attempt(call) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def compare(folder) -> int:
    """Ours and theirs on every chat and option; how many of them both rendered."""
    ours = Tokenizer.from_folder(folder, eos_ids=(4095,), pad_id=1)
    theirs = AutoTokenizer.from_pretrained(folder)
    rendered = 0
    for chat in CHATS:
        for options in OPTIONS:
            expected = attempt(lambda: theirs.apply_chat_template(chat, tokenize=False, **options))  # noqa: B023
            text = attempt(lambda: ours.render_chat(chat, **options))  # noqa: B023
            if isinstance(expected, Exception):
                assert isinstance(text, TokenizerError), (chat, options, expected, text)
                continue
            assert text == expected, (chat, options)
            ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
            assert ours.encode_chat(chat, **options) == ids, (chat, options)
            rendered += 1
    return rendered


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(SHIPPED / name, tmp_path / name)
    change(tmp_path, chat_template=None)
    return tmp_path


def change(folder, **values) -> None:
    """Set keys of tokenizer_config.json; None takes one out."""
    path = folder / "tokenizer_config.json"
    kept = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(name, folder):
    if (template := TEMPLATES[name]) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert compare(folder) >= 8  # some templates refuse some chats, here as there


@pytest.mark.parametrize("name", ["tokens", "olmoe", "generation"])
def test_special_tokens_are_those_of_transformers_however_they_are_named(name, folder):
    template = TEMPLATES[name] or OLMOE_CHAT_TEMPLATE
    change(folder, chat_template=[{"name": "default", "template": template}, {"name": "tool_use", "template": "T"}])
    token = {"content": "<|padding|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    compare(folder)
    # An ordinary entry of the vocabulary as the end of a text, and a token written out as an object.
    change(folder, eos_token="Ġthe", bos_token={"__type": "AddedToken", **token}, sep_token="the")
    compare(folder)
    names = {"eos_token": token, "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    compare(folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    compare(folder)


def test_a_folder_without_a_template_has_olmoes_with_the_assistants_part_marked(folder, tmp_path):
    chat = CHATS[1]
    for tokenizer in (AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(SHIPPED)):
        out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        marked = [i for i, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
        assert tokenizer.decode(marked) == "A1 <|endoftext|>A2  \n<|endoftext|>"
        tokenizer.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved/chat_template.jinja").read_text(encoding="utf-8") == OLMOE_CHAT_TEMPLATE
    own = AutoTokenizer.from_pretrained(folder, chat_template="mine")
    assert own.chat_template == "mine"


def test_the_date_is_that_of_now():
    before = datetime.now()
    text = render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}", CHATS[0])
    assert before.replace(microsecond=0) <= datetime.strptime(text, "%Y-%m-%d %H:%M:%S") <= datetime.now()


def test_messages_may_be_objects_and_a_template_changes_nothing_of_them():
    @dataclasses.dataclass
    class Message:
        role: str
        content: Any
        name: str | None = None

    class Dumped:
        def model_dump(self):
            return {"role": "tool", "content": {"n": np.int64(3), "flag": np.bool_(False), "x": object()}}

    chat = [Message("user", "Hi"), Dumped()]
    template = "{% for m in messages %}{{ m.role }} {{ m.content | tojson }} {{ 'name' in m }}\n{% endfor %}"
    assert render(template, chat) == 'user "Hi" False\ntool {"n": 3, "flag": false, "x": "<object>"} False\n'
    message = {"role": "assistant", "content": [{"type": "text", "text": "go"}]}
    assert render("{{ messages[-1].content[0].text }}!", [message], continue_final_message=True) == "go"
    assert message == {"role": "assistant", "content": [{"type": "text", "text": "go"}]}


def test_what_cannot_be_rendered_is_one_sentence():
    user = [{"role": "user", "content": "Hi"}]
    plain = "{{ messages[0].content }}"

    def sentence(template, chat=user, **options):
        return refused(lambda: render(template, chat, **options), TokenizerError)

    assert "leave out" in sentence(plain, add_generation_prompt=True, continue_final_message=True)
    assert "no 'content' to continue" in sentence(plain, [{"role": "user"}], continue_final_message=True)
    assert "does not write 'thinking'" in sentence(
        plain, [{"role": "user", "thinking": "T", "content": ""}], continue_final_message="thinking"
    )
    assert "leaves the final message out" in sentence("content", continue_final_message=True)
    assert "no text to continue" in sentence(plain, [{"role": "user", "content": [{}]}], continue_final_message=True)
    assert "JSON schema" in sentence(plain, tools=[len])
    assert "title and text" in sentence(plain, documents=["text"])
    assert "unknown tag" in sentence("{% unknowntag %}")
    assert "first line second line" in sentence("{{ raise_exception('first line\nsecond line') }}")


def test_special_tokens_of_the_checkpoints_own_names_are_seen_too(folder, tmp_path):
    """transformers shows templates what `extra_special_tokens` names."""
    change(
        folder,
        extra_special_tokens={"image_token": "<img>"},
        chat_template="{{ image_token }}{{ messages[0].content }}",
    )
    messages = [{"role": "user", "content": "a"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert expected == "<img>a"
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(messages) == expected
    (tmp_path / "copy").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text(tokenizer.transformers_config(64))
    for again in (
        Tokenizer.from_folder(tmp_path / "copy").render_chat(messages),
        AutoTokenizer.from_pretrained(tmp_path / "copy").apply_chat_template(messages, tokenize=False),
    ):
        assert again == expected
