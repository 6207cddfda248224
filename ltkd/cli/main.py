"""The command ``ltkd``: the front door to training, export and service.

Nothing heavy is imported before a command runs, so ``--help`` answers at once, and an install without torch serves.
This is the one module of ``ltkd`` that knows the rooms ``export`` and ``serve``.
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

# How long a thread of torch's OpenMP runtime waits for the others before it sleeps. The runtime's own 300,000 rounds
# make training twenty times slower as soon as another process wants a core (docs/lab-book.md).
SPIN_COUNT = "10000"


def main() -> None:
    """Run a command; what the user can put right ends in one line on stderr and exit code 2."""
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
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror}; make room and give the same command again.", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        click.echo(f"error: this command needs {error.name}; install it with: pip install 'ltkd[{extra}]'", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what is complete is kept: the same command goes on from there.", err=True)
        sys.exit(INTERRUPTED)


EXTRA_OF_PACKAGE = {
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    "tensorboard": "tensorboard",
    **dict.fromkeys(("onnx", "onnxscript", "scipy"), "export"),
    **dict.fromkeys(("onnxruntime", "fastapi", "uvicorn", "prometheus_client"), "serve"),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ltkd")
def cli() -> None:
    r"""Train, certify and serve classifiers that look after the tail of long-tailed data.

    \b
    The whole journey on rendered characters, in a few minutes:
        ltkd pipeline
    Step by step, on images of your own (train/CLASS/*.png and test/CLASS/*.png):
        ltkd train --data photos --model resnet20 --out runs/teacher
        ltkd distill runs/teacher --method ltkd --model resnet8 --out runs/student
        ltkd export runs/student --out bundles/student
        ltkd serve bundles/student
    """


for _command in (train, distill, compare, export, parity, verify, inspect, serve, key, classify, pipeline):
    cli.add_command(_command)
