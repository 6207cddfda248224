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


@click.command(short_help="Certify a run per class group and bundle it as ONNX models.")
@path_argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the bundle to write.")
@click.option(
    "--precisions",
    help="Precisions to certify, separated by commas: fp32, int8 (runs on the CPU) and fp16 (runs on CUDA); fp32 is "
    "always included.  [default: all that can be certified on this machine]",
)
@margin_option("fp32: 0.5pp per group, 0.2pp for all; fp16: 1pp and 0.5pp; int8: 2pp and 1pp")
@click.option(
    "--target-precision",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of the accepted predictions that must be right, in every group. The service abstains from predictions "
    "below the confidence threshold that achieves it.",
)
@click.option(
    "--target-coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Share of the images whose true class must be in the prediction set, in every group.",
)
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    help="Also write the bundle to this directory as a model repository for NVIDIA Triton Inference Server.",
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
    """Convert RUN, a run folder, to ONNX, and bundle the models if every class group kept its accuracy.

    Each precision is certified separately. The bundle contains the models that passed, a report (parity.html), a
    confidence calibration for each class group, and a model card. No bundle is written unless fp32 passes. Models that
    did not pass are written to the directory rejected/ beside the bundle.

    Exit codes: 0 PASS, 1 FAIL, 2 error in usage or input, 3 INCONCLUSIVE (too few images). The exit code depends on
    fp32 and on the precisions given with --precisions.

    With --triton and without --out, RUN is an existing bundle.
    """
    from export.bundling import export_run
    from export.certification.certify import ExportRequirements
    from export.triton import write_triton
    from ltkd.contract.bundle import open_bundle

    if out is None and triton is None:
        raise UsageError(
            "there is nothing to write; give --out BUNDLE, or a bundle instead of RUN with --triton DIRECTORY."
        )
    if out is not None:
        required = None if precisions is None else parse_precisions(precisions)
        policy = ExportRequirements(required, parse_margins(margins), target_precision, target_coverage)
        print_verdicts(export_run(run, out, policy, on_message=make_console().print), required or ())
    if triton is not None:
        click.echo(f"model repository: {write_triton(open_bundle(out or run), triton)}")


@click.command(short_help="Compare the accuracy of any two models per class group.")
@path_argument("reference")
@path_argument("candidate")
@data_options
@margin_option("2pp per group, 1pp for all")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory for the reports parity.json and parity.html.  [default: only print the result]",
)
def parity(
    reference: Path, candidate: Path, data_config: "DataConfig", margins: tuple[str, ...], out: Path | None
) -> None:
    """Test whether CANDIDATE keeps the accuracy of REFERENCE in every class group, on the test images of --data.

    REFERENCE and CANDIDATE are each a run folder, a bundle or any ONNX file. An ONNX file needs exactly one input,
    either uint8 [N, S, S, 3] or normalised float32 [N, 3, S, S], and the logits as its first output.

    Exit codes: 0 PASS, 1 FAIL, 2 error in usage or input, 3 INCONCLUSIVE (too few images).
    """
    from export.parity import common_resizing, compare_models, open_model
    from export.report.console import print_report
    from export.report.html import write_report
    from export.schema import EXIT_CODES
    from ltkd.training.progress import load_with_progress

    console = make_console()
    resizing = common_resizing(reference, candidate)
    data = load_with_progress(data_config.model_copy(update={"resizing": resizing}), console)
    report = compare_models(
        open_model(reference, data.task), open_model(candidate, data.task), data, parse_margins(margins)
    )
    print_report(report, console)
    if out is not None:
        write_report(report, out)
        click.echo(f"report: {out}")
    sys.exit(EXIT_CODES[report.verdict])


@click.command(short_help="Check that a bundle is complete, unchanged and certified.")
@path_argument("bundle")
def verify(bundle: Path) -> None:
    """Check BUNDLE on this machine.

    All files must be complete, unchanged and certified, and every model must give the same outputs for the bundle's
    golden images as when it was exported. Exit codes: 0 if all checks pass, 2 if one fails.
    """
    from export.verify import verify_bundle

    verification = verify_bundle(bundle)
    for check in verification.checks:
        click.echo(f"{check.precision}: {check.finding}")
    if verification.unlisted_files:
        click.echo(
            f"files that are not part of the bundle and are never read: {', '.join(verification.unlisted_files)}"
        )
    precisions = ", ".join(verification.manifest.precisions)
    click.echo(
        f"{bundle} is complete and unchanged. It was certified ({precisions}) on {verification.manifest.certified_on}."
    )


@click.command(short_help="Show the contents of a bundle.")
@path_argument("bundle")
def inspect(bundle: Path) -> None:
    """Show the contents of BUNDLE: classes and groups with their accuracy and confidence, and the certification."""
    from export.report.console import bundle_summary
    from export.verify import read_report
    from ltkd.contract.bundle import open_bundle

    opened = open_bundle(bundle)
    make_console().print(bundle_summary(opened, read_report(opened)))


def print_verdicts(export: "Export", required: "tuple[ModelPrecision, ...]" = ()) -> None:
    """Print the verdict of every precision; exit with a code other than 0 unless fp32 and all required ones passed.

    Args:
        export: The result of an export.
        required: The precisions that decide the exit code beside fp32, without which no other one is tried.
    """
    from export.certification.gates import combine_verdicts
    from export.report.console import print_report
    from export.schema import EXIT_CODES

    console = make_console()
    print_report(export.report, console)
    if export.rejected:
        click.echo(f"did not pass: {export.rejected}")
    if export.bundle:
        click.echo(f"certified: {export.bundle}")
    verdicts = [report.verdict for report in export.report.candidates if report.precision in ("fp32", *required)]
    if code := EXIT_CODES[combine_verdicts(verdicts)]:
        sys.exit(code)
