"""Chat templates render as transformers renders them; the templates here follow the families in use."""

import datetime
import json
import pathlib
import shutil

import pytest

import router.openai.chat_template as module
from baton.errors import InvalidRequestError
from router.model_card import ModelCard
from router.openai.chat_template import ChatTemplate
from tests.router.openai.tools.conversation import TOOLS

DEMO = pathlib.Path("deploy/demo/model")
CARD = ModelCard(name="demo", architecture="LlamaForCausalLM", vocab_size=512)

TEMPLATES = {
    file.stem: file.read_text() for file in sorted((pathlib.Path(__file__).parent / "chat_templates").iterdir())
}
TEMPLATES["demo"] = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]

USER = {"role": "user", "content": "  What is <b>this</b>? Köln 🌍 'x' \n"}
ASSISTANT = {"role": "assistant", "content": " A tag. "}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "\nI should look.\n",
    "tool_calls": [
        {
            "id": "a1b2c3d4e",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Köln", "n": 1}},
        }
    ],
}
CONVERSATIONS = {
    "one": [USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": "Sure?"}],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "tools": [USER, CALL, {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "20"}],
    "answered": [USER, ASSISTANT],
}
# Of the conversations above those that a template refuses, or cannot read.
REFUSED = {("gemma", "system"), ("gemma", "tools"), ("chatml", "tools"), ("demo", "tools"), ("documents", "tools")}


def checkpoint(folder, config=None, **files):
    """The demo checkpoint's tokenizer with another configuration and other files beside it."""
    base = json.loads((DEMO / "tokenizer_config.json").read_text())
    base.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps({**base, "unk_token": "<unk>", **(config or {})}))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, folder / name)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return str(folder)


def reference(folder, messages, tools=None, **kwargs):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)


def template(source):
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}, model="demo")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("with_tools", [False, True], ids=["plain", "with-tools"])
def test_renders_as_transformers(tmp_path, name, with_tools):
    folder = checkpoint(
        tmp_path, {"chat_template": TEMPLATES[name], "image_token": {"content": "<img>", "__type": "AddedToken"}}
    )
    ours = ChatTemplate.load(folder, CARD)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tools = TOOLS if with_tools else None
    for kind, messages in CONVERSATIONS.items():
        if (name, kind) in REFUSED:
            continue
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "documents": [{"title": "T", "text": "tëxt"}], "enable_thinking": False},
        ):
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, **options)
            own = {key: options[key] for key in options if key != "enable_thinking"}
            kwargs = {key: options[key] for key in options if key == "enable_thinking"}
            assert ours.render(messages, tools, **own, template_kwargs=kwargs) == expected, kind


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "demo"])
def test_a_final_message_is_continued_as_by_transformers(tmp_path, name):
    folder = checkpoint(tmp_path, {"chat_template": TEMPLATES[name]})
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for content in ("The answer is", "The answer is "):
        messages = [USER, {"role": "assistant", "content": content}]
        assert ChatTemplate.load(folder, CARD).render(messages, **options) == reference(folder, messages, **options)


class TestLoad:
    def test_the_default_and_the_one_for_tools(self, tmp_path):
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        loaded = ChatTemplate.load(checkpoint(tmp_path, {"chat_template": named}), CARD)
        assert (loaded.render([USER]), loaded.render([USER], TOOLS)) == ("plain", "tools")
        assert (loaded.source(), loaded.source(tools=True)) == ("plain", "tools")

    def test_files_win_over_the_configuration(self, tmp_path):
        folder = checkpoint(
            tmp_path,
            {"chat_template": "old"},
            chat_template_jinja="plain\n",
            additional_chat_templates__tool_use_jinja="tools",
        )
        loaded = ChatTemplate.load(folder, CARD)
        assert loaded.render([USER]) == reference(folder, [USER]) == "plain"
        assert loaded.render([USER], TOOLS) == reference(folder, [USER], TOOLS) == "tools"

    def test_special_tokens_of_older_checkpoints(self, tmp_path):
        source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}"
        tokens = {
            "bos_token": {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        }
        folder = checkpoint(
            tmp_path,
            {"chat_template": source, "bos_token": None},
            special_tokens_map_json=json.dumps({**tokens, "pad_token": "</s>"}),
        )
        assert ChatTemplate.load(folder, CARD).render([USER]) == reference(folder, [USER]) == "<s>|</s>|</s>|"

    def test_a_checkpoint_without_one_says_what_to_do(self, tmp_path):
        loaded = ChatTemplate.load(checkpoint(tmp_path), CARD)
        assert loaded.source() is None
        with pytest.raises(
            InvalidRequestError, match="messages: demo has no chat template: send a prompt to /v1/completions"
        ):
            loaded.render([USER])

    def test_a_template_with_a_mistake_names_the_line(self, tmp_path):
        with pytest.raises(ValueError, match="chat template 'default' of demo: line 2"):
            ChatTemplate.load(checkpoint(tmp_path, {"chat_template": "a\n{% if %}"}), CARD)

    def test_a_configuration_that_is_no_template(self, tmp_path):
        with pytest.raises(ValueError, match="chat_template is neither a text nor a list of named ones"):
            ChatTemplate.load(checkpoint(tmp_path, {"chat_template": [1]}), CARD)


class TestOpenAIMessages:
    def test_arguments_are_an_object_for_the_template(self):
        call = {"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}
        source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments.items() | list }}{% endfor %}"
        assert template(source).render([{"role": "assistant", "tool_calls": [call]}]) == "[('a', 1)]"
        call["function"]["arguments"] = "{a"
        with pytest.raises(
            InvalidRequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments: is not valid JSON"
        ):
            template(source).render([{"role": "assistant", "tool_calls": [call]}])

    def test_text_parts_become_a_string_where_the_template_reads_one(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert template("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"
        listed = template("{% for m in messages %}{% for p in m['content'] %}<{{ p.text }}>{% endfor %}{% endfor %}")
        assert listed.render([{"role": "user", "content": parts}]) == "<a><b>"
        renamed = template("{% set c = messages[0].content %}{% for p in c %}<{{ p.text }}>{% endfor %}")
        assert renamed.render([{"role": "user", "content": parts}]) == "<a><b>"

    def test_other_parts_are_refused(self):
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        with pytest.raises(
            InvalidRequestError,
            match=r"messages\[0\].content\[0\]: only text is served, got a part of type 'image_url'",
        ):
            template("{{ messages }}").render([{"role": "user", "content": [image]}])

    def test_developer_is_system_to_a_template_that_does_not_know_it(self):
        messages = [{"role": "developer", "content": "x"}]
        assert template("{{ messages[0].role }}").render(messages) == "system"
        assert template("{{ messages[0].role }}{# developer #}").render(messages) == "developer"

    def test_the_client_s_messages_stay_as_they_are(self):
        messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "name": None}]
        before = json.dumps(messages)
        listed = template("{% for p in messages[0].content %}{{ p.text }}{% endfor %}")
        listed.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert json.dumps(messages) == before


class TestRefusals:
    def test_what_the_template_itself_refuses(self):
        with pytest.raises(
            InvalidRequestError, match="messages: the chat template refuses them: System role not supported"
        ):
            template(TEMPLATES["gemma"]).render(CONVERSATIONS["system"])

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages[0].content + 1 }}",
            "{{ 1 / 0 }}",
            "{{ messages[9].role.x }}",
            "{{ none.x.y }}",
            "{{ ''.__class__.x }}",
        ],
    )
    def test_what_the_template_cannot_render(self, source):
        with pytest.raises(InvalidRequestError, match="messages: the chat template"):
            template(source).render([USER])

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception.__globals__ }}",
            "{% set ns = namespace(_x=1) %}",
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
        ],
    )
    def test_a_template_cannot_reach_beyond_its_inputs(self, source):
        try:
            rendered = template(source).render([USER])
        except InvalidRequestError:
            return
        assert rendered == ""

    def test_a_prompt_without_end(self, monkeypatch):
        monkeypatch.setattr(module, "_MAX_CHARS", 1000)
        endless = template("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
        with pytest.raises(InvalidRequestError, match="messages: the chat template makes more than 1000 characters"):
            endless.render([USER])

    def test_values_that_are_nested_too_deeply(self):
        deep = {}
        for _ in range(5000):
            deep = {"a": deep}
        with pytest.raises(InvalidRequestError, match="messages: "):
            template("{{ tools | tojson }}").render([USER], [deep])

    def test_fields_that_contradict_each_other(self):
        plain = template("{% for m in messages %}{{ m.content }}{% endfor %}")
        with pytest.raises(InvalidRequestError, match="continue_final_message: cannot go with add_generation_prompt"):
            plain.render([USER], continue_final_message=True)
        with pytest.raises(
            InvalidRequestError, match="chat_template_kwargs: messages is a field of the request itself"
        ):
            plain.render([USER], template_kwargs={"messages": []})
        with pytest.raises(InvalidRequestError, match="messages: at least one message is needed"):
            plain.render([])
        with pytest.raises(InvalidRequestError, match="continue_final_message: the last message has no content"):
            plain.render([{"role": "user"}], add_generation_prompt=False, continue_final_message=True)
        with pytest.raises(InvalidRequestError, match="continue_final_message: the chat template drops"):
            template("{{ messages[0].role }} content").render(
                [USER], add_generation_prompt=False, continue_final_message=True
            )


def test_the_date_is_todays():
    assert template("{{ strftime_now('%Y') }}").render([USER]) == str(datetime.datetime.now().year)
