"""API keys: the key file, the roles, and the problems of rejected requests."""

import hashlib
import stat
from pathlib import Path

import pytest

from ltkd.errors import UsageError
from serve.http.api_keys import ROLES, Key, Keys, Role, make_key, read_keys
from serve.http.bodies import BodyMemory
from serve.http.service import RequestContext
from serve.problems import ProblemError


def key_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def rejection(keys: Keys, authorization: str, *roles: Role, context: RequestContext | None = None) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        keys.authorise(authorization, *roles, context=context)
    return caught.value


class Clock:
    """A clock that the test sets; it begins at a number that has rounding errors in binary."""

    def __init__(self) -> None:
        self.now = 1e6 + 0.1

    def __call__(self) -> float:
        return self.now


class LimitedKey:
    """A key with a limit, and the time."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.clock = path, Clock()
        self.secret, line = make_key("camera", "classify", limit=limit)
        self.keys = Keys(key_file(path, line), self.clock)

    def change_limit(self, limit: str) -> None:
        line = self.path.read_text().strip()
        key_file(self.path, ":".join([*line.split(":")[:3], *([limit] if limit else [])]))
        self.keys.reload()

    def accepts(self) -> bool:
        try:
            self.keys.authorise(f"Bearer {self.secret}", "classify")
        except ProblemError as error:
            assert error.problem.status == 429
            return False
        return True

    def burst(self) -> int:
        """How many requests are accepted at this moment."""
        num = 0
        while self.accepts():
            num += 1
        return num


def test_a_generated_key_is_accepted_under_its_name(tmp_path: Path) -> None:
    key, line = make_key("camera-3", "classify")
    other, other_line = make_key("camera-4", "classify")
    keys = Keys(key_file(tmp_path / "keys", "# ours", "", line, other_line))
    assert keys.authorise(f"Bearer {key}", "classify").name == "camera-3"
    assert keys.authorise(f"bearer {other}", "classify").name == "camera-4"


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


def test_a_line_has_one_role_or_several_and_an_optional_limit(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    read = read_keys(key_file(tmp_path / "keys", f"a:classify:{digest}", f"b:classify,feedback:{digest}:2.5",
                              f"c:admin:{digest}", f"d:metrics:{digest}:20"))  # fmt: skip
    assert read == (
        Key("a", frozenset({"classify"}), bytes.fromhex(digest)),
        Key("b", frozenset({"classify", "feedback"}), bytes.fromhex(digest), 2.5),
        Key("c", frozenset(ROLES), bytes.fromhex(digest)),
        Key("d", frozenset({"metrics"}), bytes.fromhex(digest), 20.0),
    )


@pytest.mark.parametrize(
    ("roles", "limit", "middle", "end"),
    [
        (("classify", "feedback"), 20.0, "classify,feedback", ":20"),
        (("metrics",), None, "metrics", ""),
        (("classify",), 0.25, "classify", ":0.25"),
        (("classify",), 99999.0, "classify", ":99999"),
    ],
)
def test_a_generated_line_has_the_roles_and_the_limit(
    tmp_path: Path, roles: tuple[Role, ...], limit: float | None, middle: str, end: str
) -> None:
    key, line = make_key("a", *roles, limit=limit)
    assert line == f"a:{middle}:{hashlib.sha256(key.encode()).hexdigest()}{end}"
    (read,) = read_keys(key_file(tmp_path / "keys", line))
    assert (read.roles, read.limit) == (frozenset(roles), limit)


@pytest.mark.parametrize("limit", [0, -1, 1e5, 0.0001, float("nan"), float("inf")])
def test_a_limit_out_of_range_is_an_error(limit: float) -> None:
    with pytest.raises(UsageError, match=r"from 0\.001 to 99999 requests a second"):
        make_key("a", "classify", limit=limit)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "admin"])
def test_a_role_allows_only_what_it_names(tmp_path: Path, role: Role) -> None:
    key, line = make_key("user", role)
    keys = Keys(key_file(tmp_path / "keys", line))
    for needed in ROLES:
        if needed == role:
            assert keys.authorise(f"Bearer {key}", needed).name == "user"
        else:
            error = rejection(keys, f"Bearer {key}", needed)
            assert error.problem.status == 403
            assert f"the key user has the role {role}; this route needs a key with the role {needed}" in str(error)
    assert keys.authorise(f"Bearer {key}").name == "user"
    assert keys.authorise(f"Bearer {key}", "admin", role).name == "user"


def test_the_name_of_the_key_is_known_for_every_request_that_has_a_valid_one(tmp_path: Path) -> None:
    key, line = make_key("camera", "classify", limit=1)
    keys = Keys(key_file(tmp_path / "keys", line))
    contexts = [RequestContext("id", None, 0.0, BodyMemory(0)) for _ in range(4)]
    assert rejection(keys, "Bearer ltkd_wrong", "classify", context=contexts[0]).problem.status == 401
    assert rejection(keys, f"Bearer {key}", "metrics", context=contexts[1]).problem.status == 403
    assert rejection(keys, f"Bearer {key}", "classify", context=contexts[2]).problem.status == 429
    assert rejection(keys, "", "classify", context=contexts[3]).problem.status == 401
    assert [(each.key, each.over_limit) for each in contexts] == [
        ("", False), ("camera", False), ("camera", True), ("", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "burst"), [(20, 20), (1, 1), (2.5, 2), (0.1, 1), (0.3, 1), (1000, 1000)])
def test_a_limit_lets_the_requests_of_one_second_come_at_once_and_no_more(
    tmp_path: Path, limit: float, burst: int
) -> None:
    key = LimitedKey(tmp_path / "keys", limit)
    assert key.burst() == burst
    key.clock.now += 1e9  # a long pause does not save up more
    assert key.burst() == burst


@pytest.mark.parametrize("limit", [20, 1, 2.5, 0.1, 7, 999.999])
def test_over_any_time_a_key_gets_its_limit(tmp_path: Path, limit: float) -> None:
    key = LimitedKey(tmp_path / "keys", limit)
    begin, accepted = key.clock.now, key.burst()
    for _ in range(500):
        key.clock.now += 0.37 / limit
        accepted += key.burst()
    given = limit * (key.clock.now - begin)  # tokens; while one waits to be asked for, a bucket of one takes no other
    assert (given if limit >= 2 else given / 1.37) < accepted <= given + max(1, limit)


@pytest.mark.parametrize("limit", [20, 1, 2.5, 0.1, 0.001, 99999])
def test_a_request_above_the_limit_is_429_and_is_accepted_after_the_time_that_it_names(
    tmp_path: Path, limit: float
) -> None:
    key = LimitedKey(tmp_path / "keys", limit)
    for pause in (0.0, 0.3, 0.9):
        key.clock.now += pause
        key.burst()
        error = rejection(key.keys, f"Bearer {key.secret}", "classify")
        assert f"the key camera is limited to {limit:g} requests a second" in error.problem.detail
        assert error.headers is not None
        seconds = int(error.headers["Retry-After"])
        assert f"try again in {seconds} s" in error.problem.detail
        assert max(1, 1 / limit - pause) <= seconds < 1 / limit + 1
        for _ in range(5):  # asking too early does not extend the time
            assert not key.accepts()
        key.clock.now += seconds
        assert key.accepts()


def test_the_limit_of_one_key_does_not_concern_another_and_counts_every_form_of_the_header(tmp_path: Path) -> None:
    noisy, noisy_line = make_key("noisy", "classify", "metrics", limit=3)
    other, other_line = make_key("other", "classify", limit=3)
    keys = Keys(key_file(tmp_path / "keys", noisy_line, other_line), Clock())
    for authorization, role in ((f"Bearer {noisy}", "classify"), (f"bearer  {noisy} ", "metrics")):
        keys.authorise(authorization, role)  # type: ignore[arg-type] # a loop over literals
    assert rejection(keys, f"BEARER {noisy}", "admin").problem.status == 403
    for authorization in (f"Bearer {noisy}", f"bearer {noisy}\t", f"BEARER   {noisy}"):
        assert rejection(keys, authorization).problem.status == 429
    assert keys.authorise(f"Bearer {other}", "classify").name == "other"


def test_wrong_keys_do_not_use_up_the_limit_of_a_key(tmp_path: Path) -> None:
    key = LimitedKey(tmp_path / "keys", 1)
    for presented in ("wrong", "camera", key.secret[:-1], key.secret + "x"):
        assert rejection(key.keys, f"Bearer {presented}", "classify").problem.status == 401
    assert key.accepts()


def test_a_reload_does_not_give_a_key_new_requests_and_a_changed_limit_holds_at_once(tmp_path: Path) -> None:
    key = LimitedKey(tmp_path / "keys", 10)
    assert key.burst() == 10
    key.keys.reload()
    assert not key.accepts()
    key.change_limit("0.01")
    key.clock.now += 99  # the old limit would have given 990 requests
    assert not key.accepts()
    key.clock.now += 1
    assert key.burst() == 1
    key.change_limit("10")
    key.clock.now += 0.1  # not 100 s
    assert key.burst() == 1
    key.change_limit("")
    assert all(key.accepts() for _ in range(1000))


def test_administration_needs_the_role_admin_which_includes_all_others(tmp_path: Path) -> None:
    user, user_line = make_key("user", "classify")
    owner, owner_line = make_key("owner", "admin")
    keys = Keys(key_file(tmp_path / "keys", user_line, owner_line))
    for role in ROLES:
        assert keys.authorise(f"Bearer {owner}", role).name == "owner"
    error = rejection(keys, f"Bearer {user}", "admin")
    assert error.problem.status == 403
    assert "the key user has the role classify" in error.problem.detail


def test_without_a_key_file_only_administration_needs_a_key_and_it_is_disabled() -> None:
    keys = Keys(None)
    for roles in [(), *((role,) for role in ROLES if role != "admin")]:
        assert keys.authorise("", *roles).name == ""
    assert "feedback" in keys.authorise("", "classify").roles
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
    assert keys.authorise(f"Bearer {new}", "classify").name == "new"
    assert rejection(keys, f"Bearer {old}").problem.status == 401


def test_a_malformed_key_file_does_not_change_the_keys(tmp_path: Path) -> None:
    key, line = make_key("a", "classify")
    path = key_file(tmp_path / "keys", line)
    keys = Keys(path)
    key_file(path, "broken")
    with pytest.raises(UsageError):
        keys.reload()
    assert keys.authorise(f"Bearer {key}", "classify").name == "a"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "has no keys"),
        ("# only a comment\n\n", "has no keys"),
        ("name\n", "line 1 "),
        ("name:root:" + "0" * 64, "line 1 "),
        ("name:admin:" + "0" * 63, "line 1 "),
        ("name:admin,:" + "0" * 64, "line 1 "),
        ("name:admin, classify:" + "0" * 64, "line 1 "),
        ("name::" + "0" * 64, "line 1 "),
        *((f"name:classify:{'0' * 64}:{limit}", "line 1 ") for limit in ("", "0", "0.000", "-1", "1e3", "٣", "5:5")),
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
