"""Everything that can be wrong with what a user hands over, as one family.

    LtkdError
    ├── UsageError          an option, a name or a combination that does not exist
    ├── DataError           a data set, a class folder, a partition of classes
    │   └── ImageError      one image
    │       ├── ImageTypeError      bytes of no image type that is read
    │       └── ImageDecodeError    damaged, truncated or too large
    ├── TrainingError       a loss that is not finite
    ├── StoppedError        a training that was asked to stop, and is saved
    ├── RunError            a run folder
    ├── BundleError         a bundle
    └── DeviceError         an execution device that is not there

A message says what was seen, what was expected and what to do. Commands print it, in one line but for lists of files,
and exit with 2 (a stopped training with 128 plus the signal); any other exception is a bug and shows its traceback.
"""


class LtkdError(Exception):
    """Something the user can put right; the message says how."""


class UsageError(LtkdError):
    """An option, a name or a combination of them that does not exist."""


class DataError(LtkdError):
    """A data set, a class folder or a partition of classes that cannot be used."""


class ImageError(DataError):
    """One image that cannot be used."""


class ImageTypeError(ImageError):
    """Bytes that are no image of a type that is read."""


class ImageDecodeError(ImageError):
    """An image of a known type that is damaged, truncated or has too many pixels."""


class TrainingError(LtkdError):
    """A training that cannot go on."""


class StoppedError(LtkdError):
    """A training that was asked to stop by a signal, and was saved first.

    Args:
        message: Where it stopped and how to go on.
        signal_number: What asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class RunError(LtkdError):
    """A run folder that is missing, incomplete or does not fit."""


class BundleError(LtkdError):
    """A bundle that is missing, incomplete, changed or of another schema."""


class DeviceError(LtkdError):
    """An execution device that was asked for and is not there."""
