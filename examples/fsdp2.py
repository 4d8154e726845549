"""GRPO updates of a model that FSDP2 shards: the head stays sharded, and the loss comes from hidden states.

    torchrun --nproc-per-node 2 examples/fsdp2.py                 # two processes on the CPU
    python examples/fsdp2.py                                      # one process: the same losses, up to rounding

Each rank has its own completions, of different lengths. `global_normalizer` counts the tokens of all ranks, so the
losses of the ranks add up to the loss of one process. On GPUs, use the backend nccl and move model and batch there.
"""

import argparse
import os

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import r1kernels

OBJECTIVE = r1kernels.objectives.dapo()


def sharded_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)  # the same weights on all ranks
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    for module in (*model.model.layers, model.model, model.lm_head):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)  # the losses of ranks add up; FSDP2 would average their gradients
        module.set_force_sum_reduction_for_comms(True)  # gloo needs this to leave the division out
    return model


def my_share(rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token ids, mask, advantages) of this rank, of eight sequences whose completions have 4 to 11 tokens."""
    rng = torch.Generator().manual_seed(1)
    ids, advantages = torch.randint(101, (8, 16), generator=rng), torch.randn(8, generator=rng)
    mask = (torch.arange(16) >= 4) & (torch.arange(16) < 8 + torch.arange(8)[:, None])
    return ids[rank::ranks], mask[rank::ranks], advantages[rank::ranks]


def train(steps: int) -> tuple[transformers.PreTrainedModel, list[float]]:
    """The model, and the loss of the whole batch at each step."""
    model, (ids, mask, advantages) = sharded_model(), my_share(dist.get_rank(), dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets, scored = ids.roll(-1, 1), mask.roll(-1, 1)  # row t scores token t + 1
    normalizer = r1kernels.global_normalizer(scored, OBJECTIVE)
    old_logprobs, history = None, []
    for _ in range(steps):
        hidden = model.model(ids).last_hidden_state
        if old_logprobs is None:  # a real run has them from its rollout
            old_logprobs = r1kernels.linear_token_logprobs(hidden, model.lm_head.weight, targets).detach()
        loss, _ = r1kernels.linear_grpo_loss(
            hidden, model.lm_head.weight, targets, advantages, old_logprobs=old_logprobs, mask=scored,
            normalizer=normalizer, objective=OBJECTIVE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        history.append(total.item())
    return model, history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save", help="a file for the trained weights of all ranks together")
    options = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    model, history = train(options.steps)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}  # every rank takes part
    if dist.get_rank() == 0:
        print(*(f"step {step}: loss {loss:.6f}" for step, loss in enumerate(history, 1)), sep="\n")
        if options.save:
            torch.save(whole, options.save)
    dist.destroy_process_group()
