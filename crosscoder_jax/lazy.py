"""Package members that are imported when first used, so that importing a package stays light."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_members(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package with lazy members.

    Args:
        package: its ``__name__``.
        modules: the module within the package that holds each member.

    Raises:
        AttributeError: by ``__getattr__``, for other names, as any module does.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__
