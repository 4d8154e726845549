from dataclasses import dataclass
from typing import Literal
@dataclass(frozen=True)
class ImportanceConfig:
    mode: Literal["none", "truncate", "mask"] = "none"
def importance_weights(a, b, mask, settings):
    gap = (a - b)[mask].abs()
    return None, {"logprob_gap_mean": gap.mean().item(), "logprob_gap_max": gap.max().item()}
