"""Modules whose `forward` is never called, although hooks of theirs have to run: a driver uses their parts instead.

Offloading in diffusers and accelerate brings weights when a module is called. The drivers call blocks one by one, and
of the guidance pass's last block only what makes keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def called(module: nn.Module) -> Iterator[None]:
    """As far as the module's hooks can see, it is called: they run before and after what is inside."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    hooks = [registry.hooks[name] for name in registry._hook_order] if registry is not None else []
    # `enable_model_cpu_offload` uses accelerate's, which take the weights away when the next model is called.
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        hook.pre_forward(module)
    for hook in reversed(hooks):  # the last one registered is the outermost
        hook.pre_forward(module)
    yield
    for hook in hooks:
        hook.post_forward(module, None)


def calls_transformer(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A driver's method that counts as a call of its transformer."""

    @wraps(method)
    def through_hooks(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        driver: Any = arguments[0]
        with called(driver.transformer):
            return method(*arguments, **options)

    return through_hooks
