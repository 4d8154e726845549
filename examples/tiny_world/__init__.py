"""A tiny world for the demos: sums to solve, people to greet, text about both, and a small model of that text.

Everything is generated from a seed, so the demos need no network. A recipe reaches it by import path:

    import_from: [../examples]
    data:
      sums: {kind: function, function: "tiny_world:sums", options: {min_terms: 4, max_terms: 6}}
"""

from .arithmetic import sums
from .greetings import guests
from .model import architecture
from .text import corpus

__all__ = ["architecture", "corpus", "guests", "sums"]
