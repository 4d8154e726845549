"""Tiny random models of many families of transformers, and their losses and gradients in two precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r1kernels import testing

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
# name -> what its configuration has beside the sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 4.0, "num_key_value_heads": 1, "attention_window_size": 16,
                        "num_hidden_layers": 3},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {"head_dim": 16, "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 4, "mamba_chunk_size": 16},
    "phi": {},
    "gptj": {"rotary_dim": 8},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1,
                "experts_implementation": "eager"},
    "granitemoe": {"logits_scaling": 2.0, "num_local_experts": 4, "output_router_logits": True,
                   "experts_implementation": "eager"},
    "mamba": {"state_size": 4},
}

# Those that need nothing beside the sizes.
MORE_FAMILIES = [
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v3",
    "diffllama", "doge", "ernie4_5", "exaone4", "falcon", "falcon_mamba", "flex_olmo", "gemma", "gemma4_unified_text",
    "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "granite_swa", "granitemoe_swa",
    "granitemoeshared", "inkling2_text", "internlm3", "jais2", "jetmoe", "lfm2", "llama4_text", "minicpm3", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "ministral3", "mistral", "modernbert-decoder", "mpt", "nanochat", "nemotron",
    "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi3", "phimoe", "seed_oss",
    "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
]


def build(family: str = "llama", **options: Any) -> Any:
    """A model in training mode, without dropout, whose logits are large enough for a soft cap to bend them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | options)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch(rows: int = 2, length: int = 9, ignored: int = 3) -> dict[str, Tensor]:
    """Token ids and labels; in the first row, some labels are ignored."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=testing.generator(1))
    labels = ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def shifted(ids: Tensor) -> Tensor:
    return nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()


Results = dict[str, Tensor]


def loss_and_gradients(model: nn.Module, loss: Callable[[Any], Tensor]) -> Results:
    model.zero_grad()
    value = loss(model)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": value.detach()} | gradients


def doubled(model: nn.Module) -> nn.Module:
    """A copy in float64. Models compute some parts in float32 whatever their dtype."""
    return copy.deepcopy(model).double()


def assert_as_exact(got: Results, own: Results, exact: Results) -> None:
    """Every error is at most twice that of the model's own forward, measured over a tensor, and one rounding more.

    One rounding: of the largest value of all gradients, because small ones are sums of large terms.
    """
    assert got.keys() == own.keys() == exact.keys()
    largest = max(value.abs().max() for value in exact.values())
    for name, value in exact.items():
        error, allowed = ((part[name].double() - value.double()).abs().max() for part in (got, own))
        assert error <= 2 * allowed + 4 * testing.EPS32 * largest, f"{name}: {error:.3g}, the model's own {allowed:.3g}"
