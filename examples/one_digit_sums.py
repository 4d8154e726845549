"""A data set for `recipes/smollm2.yaml`: sums of two digits, asked after one worked example."""

from r1kernels.train.rng import python_generator

EXAMPLE = "What is 2 + 2?\nAssistant: <think> 2 + 2 = 4 </think> <answer> 4 </answer>\nUser: What is {a} + {b}?"


def problems(split: str, count: int | None, seed: int, *, test_size: int = 16) -> list[dict[str, str]]:
    """All sums of two digits from 1 to 9 except the example, in random order; `test_size` of them are held out."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10) if (a, b) != (2, 2)]
    python_generator(0, "one digit sums").shuffle(sums)
    chosen = sums[:test_size] if split == "test" else sums[test_size:]
    return [{"question": EXAMPLE.format(a=a, b=b), "answer": str(a + b)} for a, b in chosen[:count]]
