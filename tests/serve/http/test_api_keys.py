"""API keys: the key file, the roles, and the problems of rejected requests."""

import hashlib
import stat
from pathlib import Path

import pytest

from ltkd.errors import UsageError
from serve.http.api_keys import Keys, Role, make_key, read_keys
from serve.problems import ProblemError


def key_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def rejection(keys: Keys, authorization: str, role: Role = "classify") -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        keys.authorise(authorization, role)
    return caught.value


def test_a_generated_key_is_accepted_under_its_name(tmp_path: Path) -> None:
    key, line = make_key("camera-3", "classify")
    other, other_line = make_key("camera-4", "classify")
    keys = Keys(key_file(tmp_path / "keys", "# ours", "", line, other_line))
    assert keys.authorise(f"Bearer {key}", "classify") == "camera-3"
    assert keys.authorise(f"bearer {other}", "classify") == "camera-4"


def test_the_line_has_a_hash_and_not_the_key() -> None:
    key, line = make_key("camera-3", "classify")
    assert key not in line
    assert line == f"camera-3:classify:{hashlib.sha256(key.encode()).hexdigest()}"


def test_keys_are_long_random_and_recognisable() -> None:
    made = {make_key("a", "classify")[0] for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("ltkd_") and len(key) >= 5 + 43 for key in made)  # 43 characters of base64 are 256 bits


@pytest.mark.parametrize("authorization", ["", "Basic YTpi", "Bearer", "Token x"])
def test_a_missing_key_is_401_with_a_challenge(tmp_path: Path, authorization: str) -> None:
    error = rejection(Keys(key_file(tmp_path / "keys", make_key("a", "classify")[1])), authorization)
    assert error.problem.status == 401
    assert error.headers == {"WWW-Authenticate": 'Bearer realm="ltkd"'}


@pytest.mark.parametrize("presented", ["wrong", "", "ltkd_\udcff", "schlüssel", "x" * 100_000])
def test_an_unknown_key_is_401_and_is_not_quoted(tmp_path: Path, presented: str) -> None:
    error = rejection(Keys(key_file(tmp_path / "keys", make_key("a", "classify")[1])), f"Bearer {presented}")
    assert error.problem.status == 401
    assert error.headers == {"WWW-Authenticate": 'Bearer realm="ltkd", error="invalid_token"'}
    assert not presented or presented not in error.problem.detail


def test_the_hash_of_a_key_is_not_a_key(tmp_path: Path) -> None:
    line = make_key("a", "classify")[1]
    assert rejection(Keys(key_file(tmp_path / "keys", line)), f"Bearer {line.split(':')[2]}").problem.status == 401


def test_administration_needs_the_role_admin_which_includes_classify(tmp_path: Path) -> None:
    user, user_line = make_key("user", "classify")
    owner, owner_line = make_key("owner", "admin")
    keys = Keys(key_file(tmp_path / "keys", user_line, owner_line))
    assert keys.authorise(f"Bearer {owner}", "admin") == "owner"
    assert keys.authorise(f"Bearer {owner}", "classify") == "owner"
    error = rejection(keys, f"Bearer {user}", "admin")
    assert error.problem.status == 403
    assert "the key user has the role classify" in error.problem.detail


def test_without_a_key_file_classification_needs_no_key_and_administration_is_disabled() -> None:
    keys = Keys(None)
    assert keys.authorise("", "classify") == ""
    error = rejection(keys, "Bearer anything", "admin")
    assert error.problem.status == 403
    assert "--key-file" in error.problem.detail


def test_a_key_is_compared_with_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key(f"k{number}", "classify") for number in range(5)]
    keys = Keys(key_file(tmp_path / "keys", *(line for _, line in made)))
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("serve.http.api_keys.hmac.compare_digest", compare)
    for key, _ in made:
        keys.authorise(f"Bearer {key}", "classify")
    assert len(compared) == 25


def test_a_revoked_key_is_rejected_after_a_reload(tmp_path: Path) -> None:
    old, old_line = make_key("old", "classify")
    new, new_line = make_key("new", "classify")
    path = key_file(tmp_path / "keys", old_line)
    keys = Keys(path)
    key_file(path, new_line)
    keys.reload()
    assert keys.authorise(f"Bearer {new}", "classify") == "new"
    assert rejection(keys, f"Bearer {old}").problem.status == 401


def test_a_malformed_key_file_does_not_change_the_keys(tmp_path: Path) -> None:
    key, line = make_key("a", "classify")
    path = key_file(tmp_path / "keys", line)
    keys = Keys(path)
    key_file(path, "broken")
    with pytest.raises(UsageError):
        keys.reload()
    assert keys.authorise(f"Bearer {key}", "classify") == "a"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "has no keys"),
        ("# only a comment\n\n", "has no keys"),
        ("name\n", "line 1 "),
        ("name:root:" + "0" * 64, "line 1 "),
        ("name:admin:" + "0" * 63, "line 1 "),
        ("na me:admin:" + "0" * 64, "line 1 "),
        (f"a:admin:{'0' * 64}\na:classify:{'1' * 64}", "repeats the name a"),
    ],
)
def test_a_malformed_key_file_is_a_one_line_error(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match=expected) as caught:
        read_keys(tmp_path / "keys")
    assert "\n" not in str(caught.value)


def test_a_key_that_was_pasted_into_the_file_is_not_quoted(tmp_path: Path) -> None:
    key, _ = make_key("a", "classify")
    with pytest.raises(UsageError) as caught:
        read_keys(key_file(tmp_path / "keys", f"a:classify:{key}"))
    assert key not in str(caught.value)


def test_a_key_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keys cannot be read \(No such file"):
        Keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is not text"):
        Keys(tmp_path / "keys")
    (tmp_path / "directory").mkdir(mode=stat.S_IRWXU)
    with pytest.raises(UsageError, match="Is a directory"):
        Keys(tmp_path / "directory")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "x" * 65, "a\nb"])
def test_a_name_with_characters_that_are_not_allowed_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="a key's name has"):
        make_key(name, "classify")
