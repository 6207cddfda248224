"""API keys: their file, who may do what, and what is said to those who may not."""

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


def refusal(keys: Keys, authorization: str, role: Role = "classify") -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        keys.authorise(authorization, role)
    return caught.value


def test_a_key_that_was_made_lets_its_owner_in_by_name(tmp_path: Path) -> None:
    key, line = make_key("camera-3", "classify")
    other, other_line = make_key("camera-4", "classify")
    keys = Keys(key_file(tmp_path / "keys", "# ours", "", line, other_line))
    assert keys.authorise(f"Bearer {key}", "classify") == "camera-3"
    assert keys.authorise(f"bearer {other}", "classify") == "camera-4"


def test_the_line_holds_a_hash_and_not_the_key() -> None:
    key, line = make_key("camera-3", "classify")
    assert key not in line
    assert line == f"camera-3:classify:{hashlib.sha256(key.encode()).hexdigest()}"


def test_keys_are_long_random_and_recognisable() -> None:
    made = {make_key("a", "classify")[0] for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("ltkd_") and len(key) >= 5 + 43 for key in made)  # 43 characters of base64 are 256 bits


@pytest.mark.parametrize("authorization", ["", "Basic YTpi", "Bearer", "Token x"])
def test_no_key_is_401_with_a_challenge(tmp_path: Path, authorization: str) -> None:
    error = refusal(Keys(key_file(tmp_path / "keys", make_key("a", "classify")[1])), authorization)
    assert error.problem.status == 401
    assert error.headers == {"WWW-Authenticate": 'Bearer realm="ltkd"'}


@pytest.mark.parametrize("presented", ["wrong", "", "ltkd_\udcff", "schlüssel", "x" * 100_000])
def test_a_key_that_is_not_known_is_401_and_is_not_repeated(tmp_path: Path, presented: str) -> None:
    error = refusal(Keys(key_file(tmp_path / "keys", make_key("a", "classify")[1])), f"Bearer {presented}")
    assert error.problem.status == 401
    assert error.headers == {"WWW-Authenticate": 'Bearer realm="ltkd", error="invalid_token"'}
    assert not presented or presented not in error.problem.detail


def test_the_hash_of_a_key_does_not_open(tmp_path: Path) -> None:
    line = make_key("a", "classify")[1]
    assert refusal(Keys(key_file(tmp_path / "keys", line)), f"Bearer {line.split(':')[2]}").problem.status == 401


def test_orders_need_the_role_admin_which_may_classify_too(tmp_path: Path) -> None:
    user, user_line = make_key("user", "classify")
    owner, owner_line = make_key("owner", "admin")
    keys = Keys(key_file(tmp_path / "keys", user_line, owner_line))
    assert keys.authorise(f"Bearer {owner}", "admin") == "owner"
    assert keys.authorise(f"Bearer {owner}", "classify") == "owner"
    error = refusal(keys, f"Bearer {user}", "admin")
    assert error.problem.status == 403
    assert "user may classify" in error.problem.detail


def test_without_a_key_file_classification_is_open_and_orders_are_refused() -> None:
    keys = Keys(None)
    assert keys.authorise("", "classify") == ""
    error = refusal(keys, "Bearer anything", "admin")
    assert error.problem.status == 403
    assert "--key-file" in error.problem.detail


def test_every_key_is_compared_wherever_the_right_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key(f"k{place}", "classify") for place in range(5)]
    keys = Keys(key_file(tmp_path / "keys", *(line for _, line in made)))
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("serve.http.api_keys.hmac.compare_digest", compare)
    for key, _ in made:
        keys.authorise(f"Bearer {key}", "classify")
    assert len(compared) == 25


def test_a_revoked_key_is_refused_once_the_file_was_read_again(tmp_path: Path) -> None:
    old, old_line = make_key("old", "classify")
    new, new_line = make_key("new", "classify")
    path = key_file(tmp_path / "keys", old_line)
    keys = Keys(path)
    key_file(path, new_line)
    keys.read_again()
    assert keys.authorise(f"Bearer {new}", "classify") == "new"
    assert refusal(keys, f"Bearer {old}").problem.status == 401


def test_a_file_that_broke_leaves_the_keys_as_they_were(tmp_path: Path) -> None:
    key, line = make_key("a", "classify")
    path = key_file(tmp_path / "keys", line)
    keys = Keys(path)
    key_file(path, "broken")
    with pytest.raises(UsageError):
        keys.read_again()
    assert keys.authorise(f"Bearer {key}", "classify") == "a"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no key"),
        ("# only a comment\n\n", "holds no key"),
        ("name\n", "line 1 "),
        ("name:root:" + "0" * 64, "line 1 "),
        ("name:admin:" + "0" * 63, "line 1 "),
        ("na me:admin:" + "0" * 64, "line 1 "),
        (f"a:admin:{'0' * 64}\na:classify:{'1' * 64}", "names a again"),
    ],
)
def test_a_key_file_that_is_not_right_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_keys(tmp_path / "keys")
    assert "\n" not in str(caught.value)


def test_a_key_that_was_pasted_into_the_file_is_not_shown(tmp_path: Path) -> None:
    key, _ = make_key("a", "classify")
    with pytest.raises(UsageError) as caught:
        read_keys(key_file(tmp_path / "keys", f"a:classify:{key}"))
    assert key not in str(caught.value)


def test_a_key_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keys cannot be read \(No such file"):
        Keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is not text"):
        Keys(tmp_path / "keys")
    (tmp_path / "directory").mkdir(mode=stat.S_IRWXU)
    with pytest.raises(UsageError, match="Is a directory"):
        Keys(tmp_path / "directory")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "x" * 65, "a\nb"])
def test_a_name_that_its_line_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a key's name has"):
        make_key(name, "classify")
