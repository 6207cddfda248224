"""Files out of a multipart form, held in memory: a container that may not write has no place for them.

A form that ends too early is refused as a whole; taken as far as it came, it would seem to have fewer images.
"""

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.problems import ProblemError, problem_of

WITH_CURL = "with curl: -F image=@FILE"


async def form_files(content_type: str, body: AsyncIterator[bytes], max_files: int) -> list[bytes]:
    """The files of a form, in order.

    Args:
        content_type: The header that names the boundary.
        body: What arrives; its bytes are counted elsewhere.
        max_files: A form with more is refused.

    Raises:
        ProblemError: The form is malformed, has no file, too many of them, or something else than files.
    """
    form = _Form(max_files)
    try:
        boundary = parse_options_header(content_type.encode("latin-1"))[1].get(b"boundary", b"")
        if not boundary:
            raise ProblemError(problem_of(400, f"the form's Content-Type names no boundary; {WITH_CURL}"))
        callbacks = {name: getattr(form, name) for name in dir(form) if name.startswith("on_")}
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type] # they are those that it knows
        async for chunk in body:
            parser.write(chunk)
    except FormParserError as reason:
        raise ProblemError(problem_of(400, f"the form is malformed: {str(reason)[:120]}; {WITH_CURL}")) from None
    if not form.ended:
        raise ProblemError(problem_of(400, "the form ends before its last boundary; send it whole."))
    if not form.files:
        raise ProblemError(problem_of(400, f"the form has no file; {WITH_CURL}"))
    return form.files


def too_many_images(max_images: int) -> str:
    """The sentence for a request with more images than are taken."""
    return f"the request has more than {max_images} images; send them in several requests."


class _Form:
    """What the parser tells of, part by part."""

    def __init__(self, max_files: int) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._max_files = max_files
        self._name = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._chunks: list[bytes] = []

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._chunks = []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise FormParserError("a part has no name in its Content-Disposition")
        if b"filename" not in options:
            detail = f"the form has a field that is no file; send files alone, {WITH_CURL}"
            raise ProblemError(problem_of(400, detail))
        if len(self.files) >= self._max_files:
            raise ProblemError(problem_of(400, too_many_images(self._max_files)))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def on_part_end(self) -> None:
        self.files.append(b"".join(self._chunks))

    def on_end(self) -> None:
        self.ended = True
