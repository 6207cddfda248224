"""The commands ``serve``, ``key`` and ``classify``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ltkd.cli.options import path_argument

if TYPE_CHECKING:
    from serve.engine.answers import Answer, RejectedImage
    from serve.http.api_keys import Role

ROLES = ["classify", "feedback", "metrics", "admin"]


@click.command(short_help="Serve bundles over HTTP.")
@path_argument("bundle")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1, which only this machine can reach]")
@click.option("--port", type=int, help="TCP port to listen on; 0 selects a free port.  [default: 8000]")
@click.option(
    "--device",
    metavar="[auto|cpu|cuda|cuda:N]",
    help="Device to run the models on. cuda: all visible GPUs; stop with an error if CUDA does not work. cuda:N: one "
    "of the GPUs. auto: cuda if it works, else the CPU.  [default: auto]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp16"]),
    help="Which model of a bundle to run.  [default: int8 on the CPU and fp16 on CUDA if the bundle has them, else "
    "fp32]",
)
@click.option(
    "--processes",
    type=int,
    help="Number of engine processes per model; they share the CPU cores. On several GPUs, a multiple of their "
    "number.  [default: one for each GPU, or one on the CPU]",
)
@click.option("--max-body-bytes", type=int, help="Size of the largest accepted request body.  [default: 20 MiB]")
@click.option(
    "--default-model",
    help="Model for requests that name none, if there are several models.  [default: such requests are rejected]",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="File of API keys with one line per key, made by: ltkd key NAME.  [default: administration is disabled, "
    "everything else needs no key]",
)
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    help="plain: readable text. json: one JSON object per line.  [default: plain]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Lowest level of messages to log. info: log one line per request.  [default: warning]",
)
@click.option("--show-settings", is_flag=True, help="Print all settings at the start, with where each one is set.")
def serve(bundle: Path, show_settings: bool, **options: "str | int | Path | None") -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    BUNDLE is a bundle, a directory of bundles (NAME/), or a directory of bundles with versions (NAME/1/, NAME/2/). All
    are served; the highest version answers requests that name none. To reload changed bundles, send SIGHUP. A changed
    bundle is served once it has been verified and warmed up; if that fails, it is not loaded.

    Every setting can also be given as an environment variable, for example LTKD_PORT=9000. Some settings have only a
    variable. Those that differ from the default are printed at the start.
    """
    from serve.main import serve as serve_bundle
    from serve.settings import read_settings

    serve_bundle(bundle, read_settings(options), options, show_settings)


@click.command(short_help="Create an API key for the service.")
@click.argument("name")
@click.option(
    "--role",
    "roles",
    type=click.Choice(ROLES),
    multiple=True,
    default=["classify"],
    show_default=True,
    help="What the key allows; can be repeated. classify: classify, and report true labels of its own answers. "
    "feedback: report true labels of all answers. metrics: read metrics and statistics per group. admin: reload "
    "bundles and keys; includes all other roles.",
)
@click.option(
    "--limit",
    type=float,
    help="Number of requests a second that are accepted; as many may come at once.  [default: no limit]",
)
def key(name: str, roles: "tuple[Role, ...]", limit: float | None) -> None:
    """Create an API key for NAME.

    The key is printed on stderr and is not stored. The line for the key file is printed on stdout. It contains only a
    hash of the key, so the key file does not give access to the service.

    \b
    To add a key to the file keys and serve with it:
        ltkd key NAME >> keys
        ltkd serve BUNDLE --key-file keys

    \b
    A key for 20 requests a second that may also report true labels:
        ltkd key NAME --role classify --role feedback --limit 20 >> keys
    """  # noqa: D301  # click does not rewrap a paragraph that starts with the character \b
    from serve.http.api_keys import make_key

    secret, line = make_key(name, *roles, limit=limit)
    click.echo(f"the key of {name}, which is not shown again: {secret}", err=True)
    click.echo(line)


@click.command(short_help="Classify image files with a bundle.")
@path_argument("bundle")
@path_argument("images", nargs=-1, required=True)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of most probable classes to list with --json.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per image, in the format of the service's responses but without answer_id.",
)
def classify(bundle: Path, images: tuple[Path, ...], top_k: int, as_json: bool) -> None:
    """Classify image files with BUNDLE, with the same results as the service.

    Exit codes: 0 if all images were classified, 1 if an image was rejected, 2 for an error in usage or input.
    """
    from serve.classify_files import classify_files
    from serve.engine.answers import RejectedImage

    results = classify_files(bundle, list(images), top_k)
    for path, result in zip(images, results, strict=True):
        click.echo(result.model_dump_json() if as_json else answer_sentence(path, result))
    if any(isinstance(result, RejectedImage) for result in results):
        sys.exit(1)


def answer_sentence(path: Path, result: "Answer | RejectedImage") -> str:
    """The result for one image as a line of text."""
    from serve.engine.answers import RejectedImage

    if isinstance(result, RejectedImage):
        return f"{path}: rejected: {result.error.detail}"
    groups = ", ".join(f"{name} {100 * confidence:.1f} %" for name, confidence in result.group_confidence.items())
    return f"{path}: {result.label} ({result.group}) with {100 * result.probability:.1f} %; by group: {groups}"
