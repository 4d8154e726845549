"""The tokenizer and the model of the tiny world."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r1kernels.train.rng import python_generator, torch_seeded
from r1kernels.train.tiny.corpus import document
from r1kernels.train.tiny.greetings import NAMES
from r1kernels.train.tiny.settings import CorpusConfig, TinyConfig

PAD, EOS = "<pad>", "<eos>"


def make_tokenizer(corpus: CorpusConfig, high: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the corpus, with every digit, newline and name a token of its own.

    Nothing else splits the text, so the merges swallow the template: a prompt is little more than its sum.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9\n]|" + "|".join(NAMES)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    rng = python_generator(seed, "tokenizer")
    texts = [piece for _ in range(1000) for piece in document(rng, corpus, 2, high)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=[chr(code) for code in range(32, 127)],  # a character without a token would vanish
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(shape: TinyConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=True,  # lets a head attend by position alone, which finding the next term of a sum needs
        # The usual 0.02 suits a width in the thousands; here learning would start late.
        initializer_range=0.6 * shape.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch_seeded(seed, "model"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
