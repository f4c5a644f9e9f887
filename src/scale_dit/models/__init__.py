"""Base models, one file a family."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from scale_dit.errors import UserError
from scale_dit.models.settings import BaseSettings


def load_family(settings: BaseSettings) -> Any:
    """The driver class that `settings.family` names.

    Raises:
        UserError: There is no such class.
    """
    module, _, name = settings.family.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"base {settings.name!r} names the family {settings.family!r}, which cannot be imported ({error}); "
            f"FLUX.1's is scale_dit.models.flux1.Flux1 (base.family=...)"
        ) from error
