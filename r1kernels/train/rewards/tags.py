"""Reading the `<think>` and `<answer>` tags of a completion, with plain string searches only.

Completions come from a model that is rewarded for finding our mistakes, and may be megabytes long, so
nothing here backtracks: every function is a fixed number of linear scans.
"""

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"


def prompt_opens_think(prompt: str) -> bool:
    """Whether the prompt ends by opening `<think>`, so that the completion starts inside the thought."""
    return prompt.rstrip().endswith(THINK)


def after_thinking(prompt: str, completion: str) -> str | None:
    """The part of a completion in which an answer counts: what follows the last `</think>`.

    A completion without any think tag is all answer, which is how a base model writes. None when the last
    thought never ends, because then no answer was given.
    """
    end = completion.rfind(THINK_END)
    if completion.rfind(THINK) > end:
        return None
    if end < 0:
        return None if prompt_opens_think(prompt) else completion
    return completion[end + len(THINK_END) :]


def is_well_formed(prompt: str, completion: str) -> bool:
    """Whether a completion is one thought and then one answer, in their tags, and nothing else."""
    text = completion.strip()
    if not prompt_opens_think(prompt):
        if not text.startswith(THINK):
            return False
        text = text[len(THINK) :]
    if THINK in text or any(text.count(tag) != 1 for tag in (THINK_END, ANSWER, ANSWER_END)):
        return False
    _, _, rest = text.partition(THINK_END)
    rest = rest.strip()
    return rest.startswith(ANSWER) and rest.endswith(ANSWER_END)
