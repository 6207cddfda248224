import pytest

from ltkd.errors import UsageError
from serve.settings import read_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LTKD_PORT", "LTKD_HOST", "LTKD_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def test_only_this_machine_is_listened_to_by_default() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.max_body_bytes == 20 * 1024 * 1024


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTKD_PORT", "9000")
    monkeypatch.setenv("LTKD_DEVICE", "cpu")
    settings = read_settings({"port": 9001, "device": None})
    assert (settings.port, settings.device) == (9001, "cpu")


def test_a_variable_that_names_no_setting_stops_the_start_and_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTKD_MAX_BODY_BITES", "1")
    with pytest.raises(UsageError, match="LTKD_MAX_BODY_BITES is no setting; did you mean LTKD_MAX_BODY_BYTES") as said:
        read_settings({})
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70_000), ("device", "tpu"), ("top_k", 0), ("max_pixels", 10**9), ("colour", "red")]
)
def test_a_value_out_of_range_is_one_line_that_names_the_setting(name: str, value: str | int) -> None:
    with pytest.raises(UsageError, match=f"LTKD_{name.upper()}") as said:
        read_settings({name: value})
    assert repr(value) in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_body_bytes": 2000, "max_queue_bytes": 1000}, "max_queue_bytes"),
        ({"max_images": 20, "max_queue_images": 10}, "max_queue_images"),
        ({"device": "cpu", "precision": "fp16"}, "fp16"),
    ],
)
def test_settings_that_contradict_each_other_stop_the_start_with_one_line(
    given: dict[str, str | int], said: str
) -> None:
    with pytest.raises(UsageError, match=f"the settings contradict each other: .*{said}") as error:
        read_settings(given)
    assert "\n" not in str(error.value)


def test_the_stop_takes_less_than_container_engines_wait() -> None:
    settings = read_settings({})
    assert settings.delay_seconds + settings.drain_seconds < 10, "docker stop waits 10 s"
