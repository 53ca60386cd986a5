"""Sparse upcycling: a mixture of experts from a dense model, so that training continues instead of starting again.

Every expert starts as a copy of the dense MLP, or as one of `split` parts of its width, and the router at random
(Komatsuzaki et al. 2022; OLMoE, section 4.1.5). With parts, the experts form groups of `split` that hold the whole
width and share their row of the router, so that a token at first chooses whole groups (He et al. 2024).

A token's output is the sum of its K experts' outputs times their probabilities, and OLMoE does not divide these by
their sum. Three forms treat that differently:

    normalized   `norm_topk_prob = true`: probabilities are divided by their sum, and the function is the dense one's
    scaled       `down` over the mean of that sum for a new router: the function is the dense one's on average
    plain        as in the paper's script: outputs shrink by that sum, and the loss jumps until training repairs it

The sum is K / E only if router logits are small. They grow with the root of D, and the chosen experts are the likeliest
ones: at D = 128 two of eight have 0.32, at OLMo-1B's 2048 they have 0.54. With `split` parts the first two forms
multiply `down` by as much again, since each expert has only that share of the width.

Shapes legend: N tokens, D hidden, E experts, K experts per token, F width of the dense MLP.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from olmoe.errors import UserError
from olmoe.weights.names import DOWN, EXPERTS, GATE_UP
from olmoe.weights.source import WeightSource

FORMS = ("normalized", "scaled", "plain")
ROUTER_STD = 0.02  # the paper's, for new routers and for noise
_TOKENS = 4096  # random ones, which tell what a new router gives to the experts that it chooses


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What to turn the MLP into: `experts`, `top_k` of which a token chooses, each a copy or one of `split` parts.

    `noise` is the share of the experts' weights to which Gaussian noise of `noise_std` is added (the paper tried half
    of them with 0.02, and found no gain). Raises `UserError` for numbers that do not fit together.
    """

    experts: int = 8
    top_k: int = 2
    split: int = 1
    form: str = "normalized"
    noise: float = 0.0
    noise_std: float = ROUTER_STD
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"There is no form {self.form!r} of upcycling; choose one of {', '.join(FORMS)}.")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"A token cannot choose {self.top_k} of {self.experts} experts; choose from 1 to that.")
        if self.split < 1:
            raise UserError(f"The MLP cannot be split into {self.split} parts; choose 1 or more.")
        for name, value in (("experts", self.experts), ("top_k", self.top_k)):
            if value % self.split:
                raise UserError(f"{name} {value} is not a multiple of split {self.split}, so groups would be broken.")
        if not 0 <= self.noise <= 1 or not self.noise_std >= 0:
            raise UserError(
                f"noise is a share from 0 to 1 and noise_std at least 0, not {self.noise} and {self.noise_std}."
            )


class UpcycledSource:
    """A dense source (a `WeightSource` with one expert) as a mixture of experts, read matrix by matrix."""

    def __init__(self, dense: WeightSource, plan: Upcycling) -> None:
        """Raises `UserError` if `dense` has several experts, or a width that does not split."""
        config = dense.config
        if config.num_experts != 1:
            raise UserError(f"{dense.path} is already sparse: it has {config.num_experts} experts.")
        if config.intermediate_size % plan.split:
            raise UserError(f"The MLP's width of {config.intermediate_size} cannot be split into {plan.split} parts.")
        self._dense, self._plan = dense, plan
        self._last: tuple[str, Tensor] | None = None  # what was read last: experts are copies of one matrix
        self._factors: dict[str, float] = {}  # of `down`, by layer
        self.config = dataclasses.replace(
            config,
            num_experts=plan.experts,
            num_experts_per_tok=plan.top_k,
            intermediate_size=config.intermediate_size // plan.split,
            norm_topk_prob=plan.form == "normalized",
        )

    @property
    def path(self) -> Path:
        """Where the dense model is."""
        return self._dense.path

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        if parameter.endswith("mlp.gate.weight"):
            return self._router(parameter)
        if f".{EXPERTS}." not in parameter:
            return self._dense.read(parameter)
        assert expert is not None
        whole, part = self._whole(parameter), expert % self._plan.split
        width = self.config.intermediate_size
        rows = slice(part * width, (part + 1) * width)
        if parameter.endswith(DOWN):
            weight = whole[:, rows] * self._down_factor(parameter.removesuffix(f"{EXPERTS}.{DOWN}"))
        else:
            assert parameter.endswith(GATE_UP)
            weight = torch.cat([half[rows] for half in whole.chunk(2)])
        return self._with_noise(weight, f"{parameter} {expert}")

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return self._dense.files()

    def _whole(self, parameter: str) -> Tensor:
        if self._last is None or self._last[0] != parameter:
            self._last = parameter, self._dense.read(parameter, 0)
        return self._last[1]

    def _down_factor(self, layer: str) -> float:
        """What `down` of a layer, such as `model.layers.0.`, is multiplied with."""
        plan = self._plan
        if plan.form != "scaled":
            return float(plan.split) if plan.form == "normalized" else 1.0
        if layer not in self._factors:
            norm = self._dense.read(f"{layer}post_attention_layernorm.weight").float()
            tokens_ND = norm * torch.randn(_TOKENS, len(norm), generator=self._generator(f"{layer}tokens"))
            p_NE = (tokens_ND @ self._router(f"{layer}mlp.gate.weight").T).softmax(dim=-1)
            self._factors[layer] = plan.split / float(p_NE.topk(plan.top_k).values.sum(dim=-1).mean())
        return self._factors[layer]

    def _router(self, parameter: str) -> Tensor:
        groups = self.config.num_experts // self._plan.split
        rows = torch.randn(groups, self.config.hidden_size, generator=self._generator(parameter)) * ROUTER_STD
        return rows.repeat_interleave(self._plan.split, dim=0)

    def _with_noise(self, weight: Tensor, name: str) -> Tensor:
        if not self._plan.noise:
            return weight
        generator = self._generator(name)
        where = torch.rand(weight.shape, generator=generator) < self._plan.noise
        noise = torch.randn(weight.shape, generator=generator) * self._plan.noise_std
        return weight + (where * noise).to(weight.dtype)

    def _generator(self, name: str) -> torch.Generator:
        """A generator whose numbers depend on the seed and on `name`, not on the order of reading."""
        digest = hashlib.sha256(f"{self._plan.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
