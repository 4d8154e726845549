"""The model of the tiny world and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r1kernels.train.rng import python_generator, torch_seeded

from .greetings import NAMES
from .text import Mixture, document

PAD, EOS = "<pad>", "<eos>"


def architecture(
    seed: int, *, text: Mapping[str, float], hidden_size: int = 96, intermediate_size: int = 256, layers: int = 3,
    heads: int = 3,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained Llama with random weights and a tokenizer of its `text`, given by the options of the corpus."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "layers": layers, "heads": heads}
    if min(sizes.values()) < 1 or hidden_size % (2 * heads):
        raise ValueError(f"the sizes are {sizes}; expected at least 1, and hidden_size a multiple of 2 x heads")
    tokenizer = make_tokenizer(seed, Mixture(**text))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, **ends,
        attention_bias=True,  # lets a head attend only by position, which it needs to find the next term of a sum
        # The usual 0.02 suits a width in the thousands. With it, learning would start late here.
        initializer_range=0.6 * hidden_size**-0.5,
    )
    with torch_seeded(seed, "model"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model, tokenizer


def make_tokenizer(seed: int, mixture: Mixture) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the text, in which every digit, newline and name is one token.

    Nothing else splits the text, so the merges cover the whole template: a prompt is little longer than its sum.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9\n]|" + "|".join(NAMES)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    rng = python_generator(seed, "tokenizer")
    texts = [piece for _ in range(1000) for piece in document(rng, mixture)]
    alphabet = [chr(code) for code in range(32, 127)]  # a character without a token would vanish
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")
