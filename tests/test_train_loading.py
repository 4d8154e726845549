"""A model that was saved and loaded computes the same bits as before."""

import copy

import torch

from r1kernels.train.loading import ALIGNMENT, load_model, settle
from r1kernels.train.tiny import CorpusConfig, TinyConfig, make_model, make_tokenizer


def test_loaded_weights_are_aligned_and_still_tied(tmp_path):
    tokenizer = make_tokenizer(CorpusConfig(), 6, 0)
    model = make_model(TinyConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2), tokenizer, 0)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.randint(2, 90, (5, 37), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, copy.deepcopy(model).eval()(ids).logits)


def test_settling_moves_only_what_begins_anywhere():
    layer = torch.nn.Linear(8, 8)
    weight, bias = torch.randn(65)[1:].view(8, 8), layer.bias.data_ptr()
    layer.weight.data = weight
    settle(layer)
    assert torch.equal(layer.weight, weight) and layer.weight.data_ptr() % ALIGNMENT == 0
    assert layer.bias.data_ptr() == bias or bias % ALIGNMENT
