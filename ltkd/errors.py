"""Every error that a user can correct, as one tree of exceptions.

    LtkdError
    ├── UsageError          an option, a name or a combination does not exist
    ├── DataError           a data set, a class folder or a partition of classes cannot be used
    │   └── ImageError      one image cannot be used
    │       ├── ImageTypeError      the bytes are not a supported image type
    │       └── ImageDecodeError    the image is damaged, truncated or too large
    │           └── ImageTooLargeError  it has too many pixels
    ├── TrainingError       training cannot continue, for example because the loss is not finite
    ├── StoppedError        a signal stopped training after a checkpoint was saved
    ├── RunError            a run folder cannot be used
    ├── BundleError         a bundle cannot be used
    └── DeviceError         an execution device is not available

A message states what was found, what was expected and what to do. Commands print it in one line (lists of files take
one line per file) and exit with code 2; a stopped training exits with 128 plus the signal number. Any other exception
is a bug and shows its traceback.
"""


class LtkdError(Exception):
    """An error that the user can correct; the message explains how."""


class UsageError(LtkdError):
    """An option, a name or a combination of them that does not exist."""


class DataError(LtkdError):
    """A data set, a class folder or a partition of classes that cannot be used."""


class ImageError(DataError):
    """One image that cannot be used."""


class ImageTypeError(ImageError):
    """Bytes that are not an image of a supported type."""


class ImageDecodeError(ImageError):
    """An image of a known type that is damaged, truncated or has too many pixels."""


class ImageTooLargeError(ImageDecodeError):
    """An image of a known type that has too many pixels; nothing of it was decoded."""


class TrainingError(LtkdError):
    """Training cannot continue."""


class StoppedError(LtkdError):
    """A signal stopped training, and a checkpoint was saved first.

    Args:
        message: Where training stopped and how to resume it.
        signal_number: The number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class RunError(LtkdError):
    """A run folder that is missing, incomplete or does not match the request."""


class BundleError(LtkdError):
    """A bundle that is missing, incomplete, changed or has another schema."""


class DeviceError(LtkdError):
    """A requested execution device is not available."""
