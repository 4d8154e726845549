"""What responses look like, whatever they are about."""


def tagged(thought: str, answer: str | int) -> str:
    """A response as the prompt asks for it."""
    return f" <think>{thought}</think>\n<answer>{answer}</answer>"
