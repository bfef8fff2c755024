"""Lets packages import their modules only when one of their names is used, so that command lines are parsed at once."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

_modules: dict[str, tuple[str, ...]] = {}


def lazy_names(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes ``__getattr__`` and ``__dir__`` of a package whose modules define the names in its ``__all__``.

    The first use of a name imports all of these modules; see :func:`import_names`.

    Args:
        package: ``__name__`` of the package.
        modules: Names of the modules in the package.
    """
    _modules[package] = modules

    def get_attribute(name: str) -> Any:
        if not name.startswith("__"):  # Python itself looks for such names when it imports a submodule.
            import_names(package)
        namespace = vars(sys.modules[package])
        if name not in namespace:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return namespace[name]

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})

    return get_attribute, list_names


def import_names(package: str) -> None:
    """Imports the modules of the lazy names of a package and its parent, so that all of them register their parts."""
    parent = package.rpartition(".")[0]
    if parent in _modules:
        import_names(parent)
    namespace = vars(sys.modules[package])
    for defined in [vars(import_module(f"{package}.{module}")) for module in _modules[package]]:
        namespace.update({name: defined[name] for name in namespace["__all__"] if name in defined})
