"""Rules of fetching MovieLens; every row here is made up."""

import json
from pathlib import Path

import pytest

from models import movielens

MADE_UP = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t3\t4\t20\n8\t5\t2\t10\n9\t5\t1\t10\n"


def test_ratings_become_interactions_by_time() -> None:
    rows = [json.loads(line) for line in movielens.to_wire(MADE_UP).splitlines()]
    assert rows[-1] == {
        "event_id": "ml-2",
        "user_id": "u7",
        "item_id": "i3",
        "kind": "rating",
        "event_time_ms": 20_000,
        "value": 4.0,
    }
    assert [row["event_id"] for row in rows] == ["ml-0", "ml-1", "ml-2"]


def test_ratings_of_one_second_are_not_in_file_order() -> None:
    lines = "header\n" + "".join(f"{user}\t1\t4\t10\n" for user in range(50))
    users = [json.loads(line)["user_id"] for line in movielens.to_wire(lines).splitlines()]
    assert sorted(users) == sorted(f"u{user}" for user in range(50))
    assert users != [f"u{user}" for user in range(50)]


def test_the_same_ratings_become_the_same_bytes() -> None:
    assert movielens.to_wire(MADE_UP) == movielens.to_wire(MADE_UP)


def test_offline_and_not_cached_names_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(movielens.MovieLensUnavailableError, match="--data synthetic"):
        movielens.fetch(tmp_path)
    assert not (tmp_path / "ml-100k.jsonl").exists()


def test_a_cached_file_that_was_changed_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ml-100k.inter").write_text(MADE_UP)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(movielens.MovieLensUnavailableError):
        movielens.fetch(tmp_path)


def test_the_cache_folder_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert movielens.default_cache_dir() == tmp_path / "stream-rerank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert movielens.default_cache_dir() == Path.home() / ".cache" / "stream-rerank"


def test_the_terms_name_use_redistribution_and_citation() -> None:
    for words in ("no commercial use", "no redistribution", "Harper", "Konstan", "2015"):
        assert words in movielens.TERMS
