"""GRPO on two ranks, with TRL's loss and in one pass: a script of `ranks.run_ranks`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import trl
from ranks import fork_ranks
from trl_cases import make_trainer, sharded_gradients, tiny_model_and_tokenizer, trained

from r1kernels.integrations.trl import R1GRPOTrainer

CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "entropy_coef": 0.1},
    "grpo": {"loss_type": "grpo", "top_entropy_quantile": 0.5, "gradient_accumulation_steps": 2},
    "unused parameters": {"loss_type": "dapo", "ddp_find_unused_parameters": True},
}


def results_of(rank: int) -> dict[str, Any]:
    warnings.simplefilter("default")  # TRL's own
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for name, settings in CASES.items():
        for kind in (trl.GRPOTrainer, R1GRPOTrainer):
            directory = Path(sys.argv[1]) / f"{rank} {name} {kind.__name__}"
            made = [make_trainer("GRPO", directory, kind=kind, model=tiny_model_and_tokenizer()[0],
                                 per_device_train_batch_size=4, ddp_backend="gloo", **settings)]
            assert made[0].accelerator.num_processes == 2
            found[name, kind.__name__] = trained(made.pop)
    for kind in (trl.GRPOTrainer, R1GRPOTrainer):
        found["sharded", kind.__name__] = sharded_gradients(kind, Path(sys.argv[1]), rank)
    return found


if __name__ == "__main__":
    fork_ranks(results_of, 2, Path(sys.argv[1]))
