import pytest

from ltkd.errors import UsageError
from serve.settings import read_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LTKD_PORT", "LTKD_HOST", "LTKD_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def test_the_default_address_is_reachable_from_this_machine_only() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.max_body_bytes == 20 * 1024 * 1024


def test_the_command_line_takes_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTKD_PORT", "9000")
    monkeypatch.setenv("LTKD_DEVICE", "cpu")
    settings = read_settings({"port": 9001, "device": None})
    assert (settings.port, settings.device) == (9001, "cpu")


def test_an_unknown_variable_is_an_error_that_suggests_the_right_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTKD_MAX_BODY_BITES", "1")
    with pytest.raises(
        UsageError, match="LTKD_MAX_BODY_BITES is not a setting; did you mean LTKD_MAX_BODY_BYTES"
    ) as error:
        read_settings({})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70_000), ("device", "tpu"), ("top_k", 0), ("max_pixels", 10**9), ("colour", "red")]
)
def test_a_value_out_of_range_is_a_one_line_error_that_names_the_setting(name: str, value: str | int) -> None:
    with pytest.raises(UsageError, match=f"LTKD_{name.upper()}") as error:
        read_settings({name: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_body_bytes": 2000, "max_queue_bytes": 1000}, "max_queue_bytes"),
        ({"max_images": 20, "max_queue_images": 10}, "max_queue_images"),
        ({"max_pixels": 2000, "max_request_pixels": 1000}, "max_request_pixels"),
        ({"device": "cpu", "precision": "fp16"}, "fp16"),
    ],
)
def test_settings_that_contradict_each_other_are_a_one_line_error(given: dict[str, str | int], expected: str) -> None:
    with pytest.raises(UsageError, match=f"the settings contradict each other: .*{expected}") as error:
        read_settings(given)
    assert "\n" not in str(error.value)


def test_shutdown_takes_less_time_than_docker_stop_allows() -> None:
    settings = read_settings({})
    assert settings.delay_seconds + settings.drain_seconds < 10, "docker stop waits 10 s"
