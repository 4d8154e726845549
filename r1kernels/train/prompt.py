"""The prompt of R1-Zero."""

# DeepSeek-R1, arXiv 2501.12948, Table 1: it fixes the structure of a response and does not say how to think.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)


def render(question: str, *, open_think: bool = False) -> str:
    """Puts a question into the R1-Zero template.

    Args:
        question: the question, as it is; braces in it are safe.
        open_think: end the prompt with `<think>`, so that every completion starts inside the thought. The
            format reward knows this from the prompt.

    Returns:
        The prompt, without trailing white space: a tokenizer would not find the same tokens after one.

    Raises:
        ValueError: the question is blank.
    """
    question = question.strip()
    if not question:
        raise ValueError("question must not be blank")
    prompt = R1_ZERO_TEMPLATE.replace("{question}", question)
    return f"{prompt} <think>" if open_think else prompt
