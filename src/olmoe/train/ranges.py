"""Which numbers a configuration may have: the limits that its keys have in common."""

from __future__ import annotations

from collections.abc import Mapping

from olmoe.errors import ConfigError, shown

_LIMIT = 2**63  # of every number: what a seed or a file size can be
_MOST = 1_000_000  # of what memory grows with before a run starts


def check_ranges(
    *, positive: Mapping[str, float], not_negative: Mapping[str, float], counts: Mapping[str, float]
) -> None:
    """Refuse numbers, by their keys, that are out of range, nan and infinity among them. `counts` are small ones."""
    for key, value in positive.items():
        if not 0 < value < _LIMIT:  # false for nan and inf as well
            raise ConfigError(f"{key} must be above 0 and below 2^63, not {shown(value)}.")
    for key, value in not_negative.items():
        if not 0 <= value < _LIMIT:
            raise ConfigError(f"{key} must be at least 0 and below 2^63, not {shown(value)}.")
    for key, value in counts.items():
        if not 0 < value <= _MOST:
            raise ConfigError(f"{key} must be above 0 and at most {_MOST:,}, not {shown(value)}.")
