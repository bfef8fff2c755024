"""Let packages import their modules when one of their names is first used: a command line is then parsed at once."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

_modules: dict[str, tuple[str, ...]] = {}


def lazy_names(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package whose ``__all__`` is defined in some of its modules.

    The first name that is used imports all of these modules; see :func:`import_names`.

    Args:
        package: Its ``__name__``.
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
    """Import the modules behind the lazy names of a package and of its parent: all is registered together."""
    parent = package.rpartition(".")[0]
    if parent in _modules:
        import_names(parent)
    namespace = vars(sys.modules[package])
    for found in [vars(import_module(f"{package}.{module}")) for module in _modules[package]]:
        namespace.update({name: found[name] for name in namespace["__all__"] if name in found})
