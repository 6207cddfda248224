"""The commands ``serve``, ``key`` and ``classify``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.options import path_argument

if TYPE_CHECKING:
    from serve.engine.answers import Answer, RejectedImage


@click.command(short_help="Serve bundles over HTTP.")
@path_argument("bundle")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="TCP port; 0 takes a free one.  [default: 8000]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="cuda: on CUDA or not at all.  [default: auto]"
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp16"]),
    help="Which certified model answers.  [default: int8 on the CPU, fp16 on CUDA, if they are there; else fp32]",
)
@click.option("--processes", type=int, help="Engine processes for each model; they share the cores.  [default: 1]")
@click.option("--max-body-bytes", type=int, help="Largest request body.  [default: 20 MiB]")
@click.option("--default-model", help="Which model answers where a request names none and there are several.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Who may use it; lines are made by: ltkd key NAME")
@click.option("--log-format", type=click.Choice(["plain", "json"]), help="json: one object a line.  [default: plain]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="info: one line a request.  [default: warning]",
)
def serve(bundle: Path, **given: "str | int | Path | None") -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    BUNDLE is a bundle, or a directory of bundles (NAME/) or of their versions (NAME/1/, NAME/2/: the highest answers).
    SIGHUP reads it again: what changed is verified and warm before it answers, and stays out if it fails.

    Every setting, these and the rarer ones, can also be given as a variable LTKD_NAME, such as LTKD_PORT=9000; all of
    them are printed at the start.
    """
    from serve.main import serve as serve_bundle
    from serve.settings import read_settings

    serve_bundle(bundle, read_settings(given), given)


@click.command(short_help="Make a key for the service.")
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key may also give orders, such as reloading.")
def key(name: str, admin: bool) -> None:
    """Make a key for NAME: printed once on stderr, and on stdout the line of it for the file of --key-file.

    The line has a hash of the key, so the file gives nobody access. In use: ltkd key NAME >> keys
    """
    from serve.http.api_keys import make_key

    secret, line = make_key(name, "admin" if admin else "classify")
    click.echo(f"the key of {name}, shown only now: {secret}", err=True)
    click.echo(line)


@click.command(short_help="Classify image files with a bundle.")
@path_argument("bundle")
@path_argument("images", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object an image, as the service answers.")
def classify(bundle: Path, images: tuple[Path, ...], top_k: int, as_json: bool) -> None:
    """Classify image files with BUNDLE, exactly as the service would. Exits with 1 if an image was refused."""
    from serve.classify_files import classify_files
    from serve.engine.answers import RejectedImage

    results = classify_files(bundle, list(images), top_k)
    for path, result in zip(images, results, strict=True):
        click.echo(result.model_dump_json() if as_json else answer_sentence(path, result))
    if any(isinstance(result, RejectedImage) for result in results):
        sys.exit(1)


def answer_sentence(path: Path, result: "Answer | RejectedImage") -> str:
    """One image's answer as a line of text."""
    from serve.engine.answers import RejectedImage

    if isinstance(result, RejectedImage):
        return f"{path}: refused: {result.error.detail}"
    groups = ", ".join(f"{name} {100 * confidence:.1f} %" for name, confidence in result.group_confidence.items())
    return f"{path}: {result.label} ({result.group}) with {100 * result.probability:.1f} %; by group: {groups}"
