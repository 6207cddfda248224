"""Messages between the processes come out as they went in, however the stream is cut."""

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
    unpack_cancel,
    unpack_request,
    unpack_response,
    unpack_text,
)

seen = st.builds(
    PredictionFacts,
    group=st.integers(0, 2**16 - 1),
    label=st.integers(0, 2**32 - 1),
    confidence=st.floats(0, 1),
    decision=st.sampled_from(["accept", "abstain", "no_guarantee"]),
    set_size=st.integers(0, 2**32 - 1),
)
outcomes = st.builds(
    ImageResult, status=st.integers(0, 599), payload=st.binary(max_size=50), seen=st.one_of(st.none(), seen)
)
seconds = st.floats(0, 1e6)
numbers = st.integers(0, 2**64 - 1)


@given(
    st.builds(
        EngineRequest,
        number=numbers,
        deadline=seconds,
        wanted=st.sampled_from(OutputKind),
        top_k=st.integers(1, 2**32 - 1),
        contents=st.lists(st.binary(max_size=50), max_size=5),
    )
)
def test_work_comes_out_as_it_went_in(work: EngineRequest) -> None:
    assert unpack_request(memoryview(pack_request(work))) == work


@given(
    st.builds(
        EngineResponse,
        number=numbers,
        decode_seconds=seconds,
        queue_seconds=seconds,
        infer_seconds=seconds,
        batch_size=st.integers(0, 2**16 - 1),
        outcomes=st.lists(outcomes, max_size=5),
    )
)
def test_what_was_done_comes_out_as_it_went_in(done: EngineResponse) -> None:
    assert unpack_response(memoryview(pack_response(done))) == done


def test_a_number_and_a_text_come_out_as_they_went_in() -> None:
    assert unpack_cancel(memoryview(pack_cancel(2**64 - 1))) == 2**64 - 1
    assert unpack_text(memoryview(pack_text(Kind.LOG, "zwölf\n"))) == "zwölf\n"


@pytest.mark.parametrize("piece", [1, 2, 4, 5, 6, 7, 64, 10_000])
def test_messages_are_found_however_the_stream_is_cut(piece: int) -> None:
    texts = ["", "a", "b" * 300, "", "c" * 5000]
    stream = b"".join(pack_text(Kind.LOG, text) for text in texts)
    inbox = MessageReader()
    found = [
        unpack_text(message)
        for start in range(0, len(stream), piece)
        for kind, message in inbox.feed(stream[start : start + piece])
        if kind == Kind.LOG
    ]
    assert found == texts
