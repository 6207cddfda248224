"""The commands ``export``, ``parity``, ``verify`` and ``inspect``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.options import data_options, make_console, margin_option, parse_margins, parse_precisions, path_argument
from ltkd.errors import UsageError

if TYPE_CHECKING:
    from export.bundling import Export
    from ltkd.config import DataConfig
    from ltkd.contract.bundle import Precision as ModelPrecision


@click.command(short_help="Certify a run per class group and bundle it as ONNX.")
@path_argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes.")
@click.option(
    "--precisions",
    help="Which to try, separated by commas: fp32, int8 (for the CPU), fp16 (for CUDA).  [default: all that can be "
    "certified here]",
)
@margin_option
@click.option(
    "--target-precision",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of accepted predictions of a group that shall be right; below the threshold the service abstains.",
)
@click.option(
    "--target-coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of a group's images whose class shall be in the prediction set.",
)
@click.option(
    "--triton", type=click.Path(path_type=Path), help="Write the bundle as a model repository of Triton here, too."
)
def export(
    run: Path,
    out: Path | None,
    precisions: str | None,
    margins: tuple[str, ...],
    target_precision: float,
    target_coverage: float,
    triton: Path | None,
) -> None:
    """Turn the run RUN into a bundle, if every class group demonstrably kept its accuracy.

    Each precision is certified on its own; the bundle has those that passed, with a report (parity.html), what
    confidence means in each group, and a model card. Without a PASS of fp32 no bundle is written. Candidates that did
    not pass go to rejected/ beside it.

    Exit codes: 0 PASS, 1 FAIL, 2 usage or input, 3 INCONCLUSIVE (too few images). Precisions named by --precisions
    all have to pass for a 0.

    With --triton alone RUN may be a bundle that exists.
    """
    from export.bundling import export_run
    from export.certification.certify import Policy
    from export.triton import write_triton
    from ltkd.contract.bundle import open_bundle

    if out is None and triton is None:
        raise UsageError("nothing to write; give --out BUNDLE, or --triton DIRECTORY with a bundle in place of RUN.")
    if out is not None:
        chosen = None if precisions is None else parse_precisions(precisions)
        policy = Policy(chosen, parse_margins(margins), target_precision, target_coverage)
        print_verdicts(export_run(run, out, policy, on_message=make_console().print), chosen)
    if triton is not None:
        click.echo(f"model repository: {write_triton(open_bundle(out or run), triton)}")


@click.command(short_help="Hold any two models against each other, per class group.")
@path_argument("reference")
@path_argument("candidate")
@data_options
@margin_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for parity.json and parity.html.")
def parity(
    reference: Path, candidate: Path, data_config: "DataConfig", margins: tuple[str, ...], out: Path | None
) -> None:
    """Say whether CANDIDATE kept the accuracy of REFERENCE in every group of classes, on the test images of --data.

    Each may be a run, a bundle or an ONNX file, made here or elsewhere: one input, uint8 [N, S, S, 3] or normalised
    float32 [N, 3, S, S], and logits first among its outputs.

    Exit codes: 0 PASS, 1 FAIL, 2 usage or input, 3 INCONCLUSIVE (too few images).
    """
    from export.parity import compare_models, open_model
    from export.report.console import print_report
    from export.report.html import write_report
    from export.schema import EXIT_CODES
    from ltkd.training.progress import load_with_progress

    console = make_console()
    data = load_with_progress(data_config, console)
    report = compare_models(
        open_model(reference, data.task), open_model(candidate, data.task), data, parse_margins(margins)
    )
    print_report(report, console)
    if out is not None:
        write_report(report, out)
        click.echo(f"report: {out}")
    sys.exit(EXIT_CODES[report.verdict])


@click.command(short_help="Check that a bundle is whole and answers as made.")
@path_argument("bundle")
def verify(bundle: Path) -> None:
    """Check that BUNDLE is whole, sound and certified, and answers its golden images as it did when made."""
    from export.verify import verify_bundle

    checked = verify_bundle(bundle)
    for check in checked.checks:
        click.echo(f"{check.precision}: {check.finding}")
    if checked.unlisted_files:
        click.echo(f"not part of it, and read by nothing: {', '.join(checked.unlisted_files)}")
    certified = ", ".join(checked.manifest.precisions)
    click.echo(f"{bundle} is whole and certified ({certified}), on {checked.manifest.certified_on}.")


@click.command(short_help="Show what a bundle is.")
@path_argument("bundle")
def inspect(bundle: Path) -> None:
    """Show what BUNDLE holds: classes and groups, accuracy and confidence of each, how it was certified."""
    from export.report.console import inspection
    from export.verify import read_report
    from ltkd.contract.bundle import open_bundle

    opened = open_bundle(bundle)
    make_console().print(inspection(opened, read_report(opened)))


def print_verdicts(export: "Export", chosen: "tuple[ModelPrecision, ...] | None" = None) -> None:
    """Print the verdict of every precision; leave with an exit code unless all that had to pass did."""
    from export.certification.gates import worst
    from export.report.console import print_report
    from export.schema import EXIT_CODES

    console = make_console()
    print_report(export.report, console)
    if export.rejected:
        click.echo(f"did not pass: {export.rejected}")
    if export.bundle:
        click.echo(f"certified: {export.bundle}")
    asked = [report.verdict for report in export.report.candidates if report.precision in (chosen or ("fp32",))]
    if code := EXIT_CODES[worst(asked)]:
        sys.exit(code)
