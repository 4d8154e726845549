"""Result files of `r1kernels bench` for tests: made up, in the format of a real one."""

from __future__ import annotations

from typing import Any

SPEED = {"r1kernels": 1.0, "torch eager": 2.7, "torch.compile": 1.8, "TRL": 4.9, "Liger": 3.1}
COPY, PRODUCTS = 11e9, {"bfloat16": 350e9, "float32": 120e9}


def example() -> dict[str, Any]:
    """A complete document: series, several operations, ceilings, errors, and things that were left out."""
    return {
        "format": 1, "date": "2026-11-30", "r1kernels": "0.2.0", "torch": "2.13.0+cpu", "python": "3.11.7",
        "peers": {"trl": "1.16.0", "liger-kernel": "0.8.5"}, "device": "Example CPU, 2 threads", "device_type": "cpu",
        "threads": 2, "instruction_set": "avx512_bf16", "memory_bytes": 24 * 2**30, "sources": "0123456789abcdef",
        "commit": "abc1234", "size": "default", "seconds": 471.3,
        "ceilings": {"copy_bytes_per_s": COPY, "gemm_flops_per_s": dict(PRODUCTS)},
        "rows": [*_heads(), *_logits(), *_tokens()], "fidelity": _fidelity(),
        "left_out": [{"what": "QuACK", "why": "not installed: pip install quack-kernels"},
                     {"what": "torch eager at V 131,072", "why": "needs 9.1 GiB; 6.2 GiB are free"}],
    }


def row(op: str, implementation: str, shape: dict[str, int], median: float, **more: Any) -> dict[str, Any]:
    return {
        "case": op, "op": op, "pass": "forward+backward", "shape": shape, "dtype": "bfloat16", "series": None,
        "variant": "", "active_share": 1.0, "implementation": implementation, "median_s": median,
        "iqr_s": median / 20, "rounds": 7, "ratio": SPEED.get(implementation, 1.0), "peak_extra_bytes": None,
        "bytes_moved": None, "flops": 0, "max_error": 2e-6, "tolerance": 1e-5, **more,
    }


def _heads() -> list[dict[str, Any]]:
    found = []
    shapes = [("vocabulary", 2048, v) for v in (8192, 32768, 65536, 131072)]
    shapes += [("tokens", n, 32768) for n in (512, 2048, 8192)]
    for series, n, v in shapes:
        flops = 6 * n * v * 1024
        for name, factor in SPEED.items():
            if name == "torch eager" and n * v > 2**27:
                continue
            memory = (n * v * 10 if name.startswith("torch") else 2048 * v * 2) + v * 1024 * 2
            found.append(row("linear_grpo_loss", name, {"N": n, "V": v, "H": 1024}, factor * flops / 280e9,
                             series=series, peak_extra_bytes=memory, flops=flops, bytes_moved=n * v * 18))
    for share in (0.1, 0.25, 0.5, 1.0):
        for how, fixed in (("clipped", 0.4), ("of advantage 0", 0.1)) if share < 1 else (("", 0.4),):
            more = {"series": "active", "active_share": share, "variant": f"{1 - share:.0%} {how}" if how else ""}
            sizes = {"N": 2048, "V": 32768, "H": 1024}
            found.append(row("linear_grpo_loss", "r1kernels", sizes, fixed + (1.2 - fixed) * share, **more))
            found.append(row("linear_grpo_loss", "torch eager", sizes, 4.0, **more))
    shape, flops = {"N": 2048, "V": 32768, "H": 1024}, 4 * 2048 * 32768 * 1024
    for op in ("linear_cross_entropy", "linear_token_logprobs"):
        for name in ("r1kernels", "torch eager", "torch.compile"):
            found.append(row(op, name, shape, SPEED[name] * flops / 250e9, flops=flops, bytes_moved=1 << 30,
                             peak_extra_bytes=300 << 20))
    found.append(row("linear_cross_entropy", "ceiling: products", shape, flops / 350e9, ratio=0.8))
    return found


def _logits() -> list[dict[str, Any]]:
    found = []
    for op in ("token_logprobs_and_entropy", "grpo_loss", "cross_entropy", "distillation_loss"):
        for v in (32000, 151936):
            moved = 2048 * v * 6
            for name in ("r1kernels", "torch eager", "torch.compile"):
                found.append(row(op, name, {"N": 2048, "V": v}, SPEED[name] ** 3 * moved / 9e9, bytes_moved=moved,
                                 peak_extra_bytes=0 if name == "r1kernels" else moved))
            found.append(row(op, "ceiling: copy", {"N": 2048, "V": v}, moved / COPY, ratio=0.8))
    return found


def _tokens() -> list[dict[str, Any]]:
    return [row(op, name, {"N": 65536}, SPEED[name] * 3e-4, dtype="float32", bytes_moved=65536 * 16, variant=variant)
            for op, variant in (("policy_loss", "grpo"), ("policy_loss", "gspo"), ("kl_estimate", "k3"))
            for name in ("r1kernels", "torch eager")]


def _fidelity() -> list[dict[str, Any]]:
    found = []
    for quantity in ("logprob", "entropy", "grad_logits", "advantage"):
        for name, scale in (("r1kernels", 1e-7), ("torch eager", 1e-3), ("TRL", 4e-4)):
            for dtype in ("bfloat16", "float32"):
                exact = quantity == "advantage" and name == "r1kernels"
                scale_ = 0.0 if exact else scale * (1 if dtype == "bfloat16" else 0.01)
                found.append({
                    "quantity": quantity, "implementation": name, "dtype": dtype, "shape": {"N": 512, "V": 32000},
                    "mean": scale_, "max": 90 * scale_, "nonfinite": 3 if name == "TRL" else 0,
                    "quantiles": {q: k * scale_ for q, k in (("0.5", 1), ("0.9", 4), ("0.99", 12), ("0.999", 40))}})
    return found
