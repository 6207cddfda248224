"""The margins: how much accuracy each class group may lose, by precision."""

from collections.abc import Mapping

from export.schema import ALL, Margins
from ltkd.contract.bundle import Precision
from ltkd.contract.class_groups import ClassGroups
from ltkd.errors import UsageError

MARGINS: dict[Precision, Margins] = {
    "fp32": Margins(overall=0.002, group=0.005),
    "fp16": Margins(overall=0.005, group=0.01),
    "int8": Margins(overall=0.01, group=0.02),
}


def margins_for(precision: Precision, overrides: Mapping[str, float], groups: ClassGroups) -> Margins:
    """Return the default margins of a precision, with some of them replaced.

    Args:
        precision: Determines the defaults.
        overrides: Acceptable loss of accuracy, a fraction, by the name of a group, or ``all`` for all images.
        groups: The class groups of the task.

    Raises:
        UsageError: A group does not exist, or a margin is not a fraction between 0 and 1.
    """
    for name, margin in overrides.items():
        if name != ALL and name not in groups.names:
            raise UsageError(
                f"a margin is given for '{name}', which is not a group; choose from {', '.join(groups.names)}, all."
            )
        if not 0 < margin < 1:
            raise UsageError(
                f"the margin of {name} is {100 * margin:g} percentage points, expected more than 0 and less than 100."
            )
    default = MARGINS[precision]
    named = {name: margin for name, margin in overrides.items() if name != ALL}
    return Margins(overall=overrides.get(ALL, default.overall), group=default.group, groups=named)
