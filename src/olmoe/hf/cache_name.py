"""The only module that knows transformers' name for the key-value cache: `past_key_values`, from 5.24 on `cache`.

Our classes take both names in either version, keep the documented `past_key_values` at its documented position, and
never pass transformers a name that the installed version does not have. Like transformers, they warn about a name that
it has deprecated.

Shapes legend: B batch, T new tokens, S cached tokens, G KV heads, Dh head dim.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeModelOutputWithPast

from olmoe.errors import UserError

CACHE: Final = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"
"""The installed version's name: an argument of `generate` and `forward`, a field of outputs."""


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that was given, under whichever name; None without one. Raises `UserError` if both were given."""
    if past_key_values is not None and cache is not None:
        raise UserError(
            f"past_key_values ({type(past_key_values).__name__}) and cache ({type(cache).__name__}) are two names of "
            "one argument; give one of them."
        )
    return cache if past_key_values is None else past_key_values


_Call = TypeVar("_Call", bound=Callable[..., Any])


def warns_of_old_name(call: _Call) -> _Call:
    """A method that warns if the cache is passed under a name that the installed transformers has deprecated."""

    @functools.wraps(call)
    def warning(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CACHE == "cache" and kwargs.get("past_key_values") is not None and not torch.compiler.is_compiling():
            warnings.warn(
                "`past_key_values` is deprecated since transformers 5.24, which calls it `cache` and will drop the old "
                f"name; {type(self).__name__} takes both.",
                FutureWarning,
                stacklevel=2,
            )
        return call(self, *args, **kwargs)

    return warning  # type: ignore[return-value]


def updated(cache: Any, k: Tensor, v: Tensor, layer: int, options: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Add k and v (B, G, T, Dh) to the cache: all its keys and values (B, G, S, Dh), and the attention's options.

    The paged cache of continuous batching needs the options and changes them, so a layer gets its own. Until 5.23 it
    travels among them, and transformers' attention functions update it.
    """
    options = dict(options)
    if CACHE == "cache":
        return *cache.update(k, v, layer, kwargs=options), options
    if not is_paged(cache):
        return *cache.update(k, v, layer), options
    return k, v, options | {"cache": cache}


def is_paged(cache: Any) -> bool:
    """Whether this is continuous batching's cache, which has its own masks and is not a `Cache`."""
    return cache is not None and not isinstance(cache, Cache)


class EitherNameGenerationMixin(GenerationMixin):
    """transformers' `generate`, which takes its cache by either name in every version.

    The name of this class must end in `GenerationMixin`: transformers recognises by it which models generate.
    """

    @warns_of_old_name
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        """See transformers' documentation of `generate`."""
        if (given := one_cache(past_key_values, cache)) is not None:
            kwargs[CACHE] = given
        return super().generate(*args, **kwargs)
