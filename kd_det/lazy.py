"""Packages that import their modules when one of their names is first used, so that a command line is parsed at once."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package whose ``__all__`` is defined in some of its modules.

    The first name that is used imports all of these modules, so that everything they register is registered together.

    Args:
        package: Its ``__name__``.
        modules: Names of the modules in the package.
    """

    def get_attribute(name: str) -> Any:
        namespace = vars(sys.modules[package])
        if not name.startswith("__"):  # Python itself looks for such names when it imports a submodule.
            for found in [vars(import_module(f"{package}.{module}")) for module in modules]:
                namespace.update({key: found[key] for key in namespace["__all__"] if key in found})
        if name not in namespace:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return namespace[name]

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})

    return get_attribute, list_names
