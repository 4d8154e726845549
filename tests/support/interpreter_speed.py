"""Makes Triton's interpreter twice as fast: half of its time, it replaces the functions of `triton.language`.

It does so before a launch, undoes it afterwards, and repeats it at each call of another `@triton.jit` function in
between, where everything is replaced already.
"""

from __future__ import annotations

import contextlib
from typing import Any


def patch_once_a_launch() -> None:
    """Changes the interpreter in this process; does nothing for a Triton whose interpreter is another."""
    with contextlib.suppress(ImportError, AttributeError):
        from triton.runtime import interpreter

        patch, tl, scope_type = interpreter._patch_lang, interpreter.tl, interpreter._LangPatchScope
        patched: set[int] = set()  # the modules that are patched until the launch ends

        def patch_lang(function: Any) -> Any:
            modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
            if modules <= patched:
                return scope_type()  # with nothing to restore
            outermost, scope = not patched, patch(function)
            patched.update(modules)
            if outermost:
                restore = scope.restore

                def restore_all() -> None:
                    patched.clear()
                    restore()

                scope.restore = restore_all
            return scope

        interpreter._patch_lang = patch_lang
