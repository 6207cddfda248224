"""Train, certify and serve classifiers that look after the tail of long-tailed data.

The loss is a function for any training loop: ``from ltkd import ltkd_loss``. Names are imported when they are first
used, so ``import ltkd`` needs neither torch nor time.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltkd.contract.class_groups import ClassGroups, groups_by_count, groups_by_mapping, groups_by_share
    from ltkd.methods.losses import GroupIndex, LTKDLoss, ltkd_loss

__version__ = "0.1.0"
__all__ = [
    "ClassGroups",
    "GroupIndex",
    "LTKDLoss",
    "groups_by_count",
    "groups_by_mapping",
    "groups_by_share",
    "ltkd_loss",
]

_MODULES = {
    "ltkd.contract.class_groups": ("ClassGroups", "groups_by_count", "groups_by_mapping", "groups_by_share"),
    "ltkd.methods.losses": ("GroupIndex", "LTKDLoss", "ltkd_loss"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'ltkd' has no attribute '{name}'; it has: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
