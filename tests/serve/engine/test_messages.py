"""Messages between the processes: packing and unpacking, and reading from a stream in pieces of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.messages import (
    EngineRequest,
    EngineResponse,
    ImageResult,
    Kind,
    MessageReader,
    OutputKind,
    PredictionFacts,
    pack_cancel,
    pack_request,
    pack_response,
    pack_text,
    unpack_number,
    unpack_request,
    unpack_response,
    unpack_text,
)

facts = st.builds(
    PredictionFacts,
    group=st.integers(0, 2**16 - 1),
    label=st.integers(0, 2**32 - 1),
    confidence=st.floats(0, 1),
    decision=st.sampled_from(["accept", "abstain", "no_guarantee"]),
    set_size=st.integers(0, 2**32 - 1),
)
results = st.builds(
    ImageResult, status=st.integers(0, 599), payload=st.binary(max_size=50), facts=st.one_of(st.none(), facts)
)
seconds = st.floats(0, 1e6)
numbers = st.integers(0, 2**64 - 1)


@given(
    st.builds(
        EngineRequest,
        number=numbers,
        deadline=seconds,
        output_kind=st.sampled_from(OutputKind),
        top_k=st.integers(1, 2**32 - 1),
        contents=st.lists(st.binary(max_size=50), max_size=5),
    )
)
def test_a_request_is_unchanged_by_packing_and_unpacking(message: EngineRequest) -> None:
    assert unpack_request(memoryview(pack_request(message))) == message


@given(
    st.builds(
        EngineResponse,
        number=numbers,
        decode_seconds=seconds,
        queue_seconds=seconds,
        infer_seconds=seconds,
        batch_size=st.integers(0, 2**16 - 1),
        results=st.lists(results, max_size=5),
    )
)
def test_a_response_is_unchanged_by_packing_and_unpacking(response: EngineResponse) -> None:
    assert unpack_response(memoryview(pack_response(response))) == response


def test_cancel_and_text_messages_are_unchanged_by_packing_and_unpacking() -> None:
    assert unpack_number(memoryview(pack_cancel(2**64 - 1))) == 2**64 - 1
    assert unpack_text(memoryview(pack_text(Kind.LOG, "zwölf\n"))) == "zwölf\n"


@pytest.mark.parametrize("piece_bytes", [1, 2, 4, 5, 6, 7, 64, 10_000])
def test_messages_are_read_from_a_stream_in_pieces_of_any_size(piece_bytes: int) -> None:
    texts = ["", "a", "b" * 300, "", "c" * 5000]
    stream = b"".join(pack_text(Kind.LOG, text) for text in texts)
    reader = MessageReader()
    found = [
        unpack_text(message)
        for start in range(0, len(stream), piece_bytes)
        for kind, message in reader.feed(stream[start : start + piece_bytes])
        if kind == Kind.LOG
    ]
    assert found == texts
