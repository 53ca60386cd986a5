"""Mutated files either load whole or are refused with a sentence: never another exception, a crash or a hang.

More than 10,000 files: every prefix of a header, hostile numbers at every offset of it (so in every count, length,
dimension, type and offset), and random bytes.
"""

from __future__ import annotations

import random
import re
import struct
import warnings

import pytest

from gguf_files import TOKENS, write_tiny
from olmoe.errors import UserError
from olmoe.weights.gguf.reader import GGUFFile
from olmoe.weights.gguf.source import GGUFSource

SENTENCE = re.compile(r"[^\n]{10,900}[^.\s]\.")
HOSTILE_64 = (0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1)
HOSTILE_32 = (0, 5, 9, 14, 2**31 - 1, 2**32 - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("fuzz") / "x.gguf").read_bytes()


@pytest.fixture(scope="module")
def header_size(whole) -> int:
    return min(t.start for t in GGUFFile.from_bytes(whole).tensors.values())


def outcome(data: bytes) -> bool:
    """Read all that the bytes hold. True if they load; anything but a `UserError` goes through."""
    try:
        source = GGUFSource(GGUFFile.from_bytes(data))
        source.files()
        for parameter in source._tensors:
            stacked = parameter.endswith(("gate_up_proj", "down_proj"))
            source.read(parameter, source.config.num_experts - 1 if stacked else None)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert SENTENCE.fullmatch(message), message
    return False


def test_the_file_itself_loads(whole):
    assert outcome(whole)
    assert len(TOKENS) == 8


def test_every_prefix_is_refused(whole, header_size):
    lengths = [*range(header_size), *range(header_size, len(whole) - 32, 97)]
    assert not any(outcome(whole[:length]) for length in lengths)


def test_hostile_numbers_at_every_offset(whole, header_size):
    loaded = count = 0
    for offset in range(4, header_size):
        choices = [struct.pack("<Q", HOSTILE_64[(offset + i) % 7]) for i in (0, 3)]
        choices.append(struct.pack("<I", HOSTILE_32[offset % 6]))
        for number in choices:
            loaded += outcome(whole[:offset] + number + whole[offset + len(number) :])
            count += 1
    assert count > 5_500
    assert loaded < count / 2  # most of a header matters


def test_random_bytes(whole, header_size):
    chance = random.Random(0)
    loaded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numpy, about what hostile weights lead to
        for _ in range(6_000):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 8))):
                end = header_size if chance.random() < 0.9 else len(data)
                data[chance.randrange(4, end)] = chance.randrange(256)
            loaded += outcome(bytes(data))
    assert 0 < loaded < 6_000


def test_random_weights_load(whole, header_size):
    chance = random.Random(1)
    for _ in range(20):
        assert outcome(whole[:header_size] + chance.randbytes(len(whole) - header_size))
