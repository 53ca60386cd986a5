"""A TOML file as a dataclass: what is meant is understood, and a mistake is answered by what to write."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from olmoe.errors import ConfigError
from olmoe.train.toml_file import build
from sentences import refused


@dataclass(frozen=True, kw_only=True)
class Item:
    path: str


@dataclass(frozen=True, kw_only=True)
class Section:
    learning_rate: float = 1.0
    tokens: int = 0
    files: tuple[Item, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)


def test_whole_numbers_may_have_an_exponent():
    tokens = build(Section, {"tokens": 5e9}, "schedule").tokens
    assert (tokens, type(tokens)) == (5_000_000_000, int)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tokens": 1.5}, "schedule.tokens must be of type int, not 1.5."),
        ({"tokens": float("inf")}, "schedule.tokens must be of type int, not inf."),
        ({"tokens": True}, "schedule.tokens must be of type int, not True."),
        ({"learning_rate": "3e-4"}, "schedule.learning_rate must be of type float, not '3e-4'; leave out the quotes."),
        ({"learning_rat": 1.0}, "known are betas, files, learning_rate, tokens; perhaps 'learning_rate' is meant."),
        ({"zzz": 1.0}, "unknown key 'zzz'; known are betas, files, learning_rate, tokens."),
        ({"files": "a.txt"}, "schedule.files must be a list of tables, such as [{ path = ... }], not 'a.txt'."),
        ({"files": ["a.txt"]}, "[schedule.files[0]] must be a table, such as { path = ... }, not 'a.txt'."),
        ({"betas": 0.9}, "schedule.betas must be a list, not 0.9."),
    ],
)
def test_mistakes_are_answered_by_what_to_write(table, says):
    assert says in refused(lambda: build(Section, table, "schedule"), ConfigError)
