"""Prompts: the paper's template, and the chat templates of tokenizers."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1kernels.train.data import R1_ZERO_TEMPLATE, Template
from r1kernels.train.errors import ConfigError

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}{{ '\\n' }}[assistant]"

render = Template("r1_zero", None).render


def tokenizer(chat_template: str | None = CHAT, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<s>", "<eos>", "?", "2", "+", "[", "]", "user"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<eos>", unk_token="?")
    wrapped.chat_template = chat_template
    return wrapped


def test_the_prompt_is_the_template_around_the_question():
    before, after = R1_ZERO_TEMPLATE.split("{question}")
    assert render(" What is {question}? {x} ") == f"{before}What is {{question}}? {{x}}{after}"
    assert render("2 + 2").endswith("User: 2 + 2. Assistant:")
    assert Template("r1_zero", None, open_think=True).render("2 + 2") == render("2 + 2") + " <think>"


def test_r1_zero_asks_the_same_of_every_tokenizer():
    for template in (None, CHAT):
        assert Template("r1_zero", tokenizer(template)).render("2 + 2") == render("2 + 2")
    assert Template("r1_zero", tokenizer(), open_think=True).render("2") == render("2") + " <think>"


def test_a_chat_template_is_used_as_it_is():
    assert Template("chat", tokenizer()).render("2 {+} 2") == "<s>[user] 2 {+} 2\n[assistant]"


def test_a_thought_is_opened_once():
    assert Template("chat", tokenizer(), open_think=True).render("2") == "<s>[user] 2\n[assistant]<think>\n"
    opening = tokenizer(CHAT + "<think>{{ '\\n' }}")
    assert Template("chat", opening, open_think=True).render("2") == "<s>[user] 2\n[assistant]<think>\n"


def test_a_prompt_begins_with_one_start_of_text():
    """A chat template writes it, and the tokenizer that gets the prompt writes another."""
    for adds_bos in (False, True):
        made = tokenizer(adds_bos=adds_bos)
        ids = made(Template("chat", made).render("2"))["input_ids"]
        assert ids[0] == made.bos_token_id and ids.count(made.bos_token_id) == 1
        wanted = made.apply_chat_template([{"role": "user", "content": "2"}], add_generation_prompt=True)
        assert ids == list(wanted["input_ids"])


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match=r"'template'.*'chat'"):
        Template("chat", tokenizer(None))
