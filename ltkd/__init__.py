"""Train, certify and serve image classifiers that stay accurate on the rare classes of long-tailed data.

The LTKD loss is a function that works in any training loop: ``from ltkd import ltkd_loss``. Each public name is
imported when it is first used, so ``import ltkd`` is fast and does not need torch.
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
