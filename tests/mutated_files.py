"""safetensors files that are wrong in one of many ways."""

from __future__ import annotations

import json
import random

from olmoe.io.tensor_file import DTYPES


def mutate(raw: bytes, text: bytes, rng: random.Random) -> bytes:
    """One way of many in which a file can be wrong: bits, bytes, lengths, or values of the header."""
    kind = rng.randrange(6)
    if kind == 0:
        return raw[: rng.randrange(len(raw))]
    if kind == 1:
        return raw + rng.randbytes(rng.randrange(1, 70))
    if kind in (2, 3):
        broken = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(8 + len(text)) if kind == 2 else rng.randrange(len(raw))
            broken[place] = rng.randrange(256)
        return bytes(broken)
    values = json.loads(text)
    if kind == 4:
        entry = values[rng.choice([name for name in values if name != "__metadata__"])]
        key = rng.choice(list(entry))
        odd = [0, -1, 1, 2**31, 2**63, 2**70, 1.5, None, "F32", "U8", [], [[]], {}, True, [0], [2**40] * 3]
        if isinstance(entry[key], list) and entry[key] and rng.random() < 0.6:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(odd)
        else:
            entry[key] = rng.choice([*odd, *DTYPES])
    else:
        names = [name for name in values if name != "__metadata__"]
        first, second = rng.sample(names, 2)
        values[first], values[second] = values[second], values[first]
        if rng.random() < 0.5:
            values.pop(rng.choice(names))
    changed = json.dumps(values).encode()
    return len(changed).to_bytes(8, "little") + changed + raw[8 + len(text) :]
