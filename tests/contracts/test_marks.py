"""tests/marks.py: every name in it is a test, and no promise leaves `make test` altogether."""

from __future__ import annotations

import pytest

from tests import marks


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """All tests of this run, those that are left out too: names by `file::function`."""
    found: dict[str, list[str]] = {}
    for file, name in request.config.stash[marks.COLLECTED]:
        found.setdefault(f"{file}::{name.partition('[')[0]}", []).append(name)
    return found


def test_every_name_is_a_test(collected: dict[str, list[str]]) -> None:
    """A test that was renamed would silently lose its marker."""
    files = {test.partition("::")[0] for test in collected}  # of some only, where a run was asked for some only
    names = [
        name
        for name in (*marks.ALONE, *marks.SLOW, *marks.LONG, *marks.TWICE, *marks.TWICE.values())
        if name.partition("::")[0] in files
    ]
    assert [name for name in names if name not in files and name not in collected] == []


def test_a_long_grid_leaves_cases_in_make_test(collected: dict[str, list[str]]) -> None:
    """Of each grid some case runs in `make test`, and some does not."""
    for test in marks.LONG:
        long = ["long" in marks.marks_of(test.partition("::")[0], name) for name in collected.get(test, ())]
        assert not long or set(long) == {True, False}, test
    for keeper in marks.TWICE.values():
        assert "long" not in marks.marks_of(keeper.partition("::")[0], keeper.partition("::")[2])
