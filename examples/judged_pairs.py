"""Makes preference pairs from samples of a stage of kind `reject`: a judge compares responses to the same question.

    python examples/judged_pairs.py runs/r1/traces/selected.jsonl pairs.jsonl --url http://localhost:8000/v1 --model M

A pair is kept if the judge prefers one of its responses clearly, with the sides as they are and swapped. In a recipe,
the file is a data set, `{kind: jsonl, path: pairs.jsonl}`, which a stage of kind `preference` names in `pairs`. Run
the command again after an interruption: it continues after the last pair in the file.
"""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from r1kernels.rewards import Judge
from r1kernels.train.data import read_jsonl, whole_response
from r1kernels.train.log import append_line, cut_lines
from r1kernels.train.reward_model import Target, judged_part
from r1kernels.train.rng import python_generator


def candidates(selected: Path, per_question: int = 1, seed: int = 0) -> list[tuple[str, str, str]]:
    """Some pairs of different responses to each question: (question, one response, another)."""
    responses: dict[str, dict[str, None]] = {}
    for _, row in read_jsonl(selected):
        responses.setdefault(row["question"], {})[whole_response(row["prompt"], row["completion"])] = None
    found = []
    for question, texts in responses.items():
        pairs = list(itertools.combinations(texts, 2))
        drawn = python_generator(seed, "pairs", question).sample(pairs, min(per_question, len(pairs)))
        found += [(question, *pair) for pair in drawn]
    return found


def judge_pairs(
    judge: Judge, pairs: list[tuple[str, str, str]], into: Path, *, margin: float = 0.5, target: Target = "summary",
    concurrency: int = 16,
) -> int:
    """Appends the pairs on which the judge is clear; returns how many the file has. Raises EndpointError.

    Args:
        margin: least preference to keep a pair, where 1 means that all votes agree.
        target: the part of a response that the judge sees, "summary" or "response", as in a stage `preference`.
    """
    lines = cut_lines(into, len(pairs))  # also removes a line that an interruption cut off
    done, kept = (lines[-1]["step"] + 1 if lines else 0), len(lines)

    def compare(pair: tuple[str, str, str]) -> float:
        question, first, second = pair
        return judge.compare(question, judged_part(target, first), judged_part(target, second))

    with ThreadPoolExecutor(concurrency) as threads:
        for start in range(done, len(pairs), concurrency):
            for step, preference in enumerate(threads.map(compare, pairs[start : start + concurrency]), start):
                question, chosen, rejected = pairs[step]
                if preference < 0:
                    chosen, rejected = rejected, chosen
                if preference and abs(preference) >= margin:
                    append_line(into, {"step": step, "question": question, "chosen": chosen, "rejected": rejected})
                    kept += 1
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("selected", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--url", required=True, help="address of a server that speaks OpenAI's chat completions")
    parser.add_argument("--model", required=True, help="name of the judge on that server")
    parser.add_argument("--api-key-env", help="environment variable that holds the key")
    given = parser.parse_args()
    compared = candidates(given.selected)
    count = judge_pairs(Judge(given.url, given.model, given.api_key_env), compared, given.pairs)
    print(f"{given.pairs} has {count} pairs, of {len(compared)} that the judge compared")
