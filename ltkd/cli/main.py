"""The command ``ltkd``: the entry point for training, export and serving.

The commands are defined in the other modules of this folder. They import heavy packages inside their functions, so
``ltkd --help`` is fast and an installation without torch can serve. Only this folder imports the packages ``export``
and ``serve``; the rest of ``ltkd`` does not depend on them.
"""

import errno
import os
import sys

import click

from ltkd import __version__
from ltkd.cli.export import export, inspect, parity, verify
from ltkd.cli.pipeline import pipeline
from ltkd.cli.serve import classify, key, serve
from ltkd.cli.train import compare, distill, train
from ltkd.errors import LtkdError, StoppedError

INTERRUPTED = 130
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

# How often a thread of torch's OpenMP runtime polls for the other threads before it sleeps. With the runtime's default
# of 300,000, training becomes twenty times slower as soon as another process needs a core (docs/lab-book.md).
SPIN_COUNT = "10000"


def main() -> None:
    """Run a command; an error that the user can correct is printed as one line on stderr, with exit code 2."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StoppedError as stop:
        click.echo(str(stop), err=True)
        sys.exit(128 + stop.signal_number)
    except LtkdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        path = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {path}{error.strerror}; free some space and run the same command again.", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        click.echo(f"error: this command needs {error.name}; install it with: pip install 'ltkd[{extra}]'", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished work is kept. To resume, run the same command again.", err=True)
        sys.exit(INTERRUPTED)


EXTRA_OF_PACKAGE = {
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    "tensorboard": "tensorboard",
    **dict.fromkeys(("onnx", "onnxscript", "scipy"), "export"),
    **dict.fromkeys(("onnxruntime", "fastapi", "uvicorn", "prometheus_client"), "serve"),
}


class OrderedGroup(click.Group):
    """A group that lists its commands in the order in which they were given, where click sorts them by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=OrderedGroup,
    commands=[pipeline, train, distill, compare, export, parity, verify, inspect, serve, classify, key],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="ltkd")
def cli() -> None:
    """Train, certify and serve image classifiers for long-tailed data.

    \b
    All steps in one command, on a small data set that is generated locally:
        ltkd pipeline

    \b
    Step by step, on your own images (photos/train/CLASS/*, photos/test/CLASS/*):
        ltkd train --data photos --model resnet20 --out runs/teacher
        ltkd distill runs/teacher --method ltkd --model resnet8 --out runs/student
        ltkd export runs/student --out bundles/student
        ltkd serve bundles/student
    """  # noqa: D301  # click does not rewrap a paragraph that starts with the character \b
