"""A data set that a recipe names by import path: sums of two digits, asked after one worked example.

    r1kernels train recipes/smollm2.yaml
"""

from r1kernels.train.rng import python_generator

QUESTION = "What is 2 + 2?\nAssistant: <think> 2 + 2 = 4 </think> <answer> 4 </answer>\nUser: What is {a} + {b}?"


def problems(split: str, count: int | None, seed: int, *, held_out: int = 16) -> list[dict[str, str]]:
    """All sums of two digits from 1 to 9 but that of the example, in random order; `held_out` of them are for tests."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10) if (a, b) != (2, 2)]
    python_generator(0, "one digit sums").shuffle(sums)  # the same held-out sums for every seed
    chosen = sums[:held_out] if split == "test" else sums[held_out:]
    return [{"question": QUESTION.format(a=a, b=b), "answer": str(a + b)} for a, b in chosen[:count]]
