"""`OlmoeLM`: an OLMoE model behind lm-evaluation-harness's interface, on the engine.

Encoding, truncation, scoring and results are those of the harness's own `hf` backend, token for token; the computation
is not: what requests have in common runs through the network once, and only tokens that count are scored.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.api.registry import register_model  # type: ignore[import-untyped]
from lm_eval.models.utils import (  # type: ignore[import-untyped]
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]
from tqdm import tqdm

from olmoe.engine.llm import CACHE_BYTES, LLM
from olmoe.engine.request import Completion
from olmoe.engine.sampling_params import SamplingParams, whole_number
from olmoe.engine.scoring import MOST_RUNS, Scorer
from olmoe.errors import TokenizerError, UserError, shown
from olmoe.io import hub
from olmoe.ops import AUTO
from olmoe.runner import RouterPolicy
from olmoe.runner.policy_file import NamedPolicy, read_policy
from olmoe.tokenizer import Tokenizer

_log = logging.getLogger("olmoe")
# An encoded request: its texts (None: a part of another request), context ids, continuation ids.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
# The most new tokens for tasks that do not set a limit.
_NEW_TOKENS = 256
# Generation arguments that tasks give: those with the same name in `SamplingParams`, ...
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "stop_token_ids",
)
# ... those with another name there, ...
_RENAMED = {"min_new_tokens": "min_tokens", "min_tokens": "min_tokens"}
# ... redundant ones, and those for which only one value is supported.
_IMPLIED = ("do_sample", "use_cache", "skip_special_tokens", "spaces_between_special_tokens")
_SINGLE = {"num_beams": 1, "num_return_sequences": 1, "n": 1}


@register_model("olmoe")
class OlmoeLM(TemplateLM):  # type: ignore[misc]
    """The model `olmoe` of lm-evaluation-harness.

    - `pretrained`: a checkpoint folder or hub id, packed or plain (None: the shipped olmoe-tiny), or an `LLM`.
      `revision`, `token` and `local_files_only` are for the hub. With an `LLM`, arguments about loading have no effect.
    - `dtype`, `device`, `kernels` (the backend of `LLM`), `threads`, `cache_bytes`, `cache_dtype`: as for `LLM`.
    - `batch_size`: the most texts in progress; "auto" takes as many as are useful. `max_batch_size` bounds "auto".
    - `max_length`: longer contexts are cut at the start (None: the model's `max_position_embeddings`).
    - `add_bos_token`: start encoded texts with the prefix token, unless they already do. `prefix_token_id`: the token
      before texts without a context (None: BOS if the checkpoint names one, else EOS).
    - `truncation`: cut contexts for generation at the model's context length first, before cutting their start.
    - `think_end_token`: a text or an id after which an answer starts; `enable_thinking` and `chat_template_args` are
      for the chat template.
    - `router_policy`: a `RouterPolicy`, or the file of one.
    - `show_progress`: bars on a terminal.

    Raises `UserError` for arguments that are impossible.
    """

    def __init__(
        self,
        pretrained: str | Path | LLM | None = None,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        kernels: str = AUTO,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        cache_dtype: str | torch.dtype | None = None,
        router_policy: RouterPolicy | NamedPolicy | str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        show_progress: bool = True,
    ) -> None:
        super().__init__()
        self._rows = _rows(batch_size, max_batch_size)
        self.name = hub.SHIPPED_NAME if pretrained is None else str(pretrained)
        if not isinstance(pretrained, LLM):
            pretrained = LLM(
                pretrained,
                dtype=dtype,
                device=_device(device),
                backend=kernels,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                threads=threads,
                cache_bytes=cache_bytes,
                cache_dtype=cache_dtype,
            )
        else:
            self.name = "olmoe"
        self.llm: LLM = pretrained
        self._device = self.llm.device
        self.tokenizer: Tokenizer = self.llm.tokenizer
        self.batch_size, self.revision = batch_size, revision
        self._show_progress = show_progress
        self._add_bos, self._truncation = bool(add_bos_token), truncation
        spelled = isinstance(think_end_token, str) and think_end_token.isdecimal()
        self.think_end_token = int(think_end_token) if think_end_token and spelled else think_end_token
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self._policy = read_policy(router_policy) if isinstance(router_policy, str | Path) else router_policy
        most = self.llm.context_length
        self.max_length = min(self.llm.config.max_position_embeddings, most) if max_length is None else max_length
        if not 2 <= whole_number("max_length", self.max_length, least=2) <= most:
            raise UserError(f"max_length is {max_length}, but the model's context ends at {most}; choose less.")
        self._special = {name: self.tokenizer.token_id(text) for name, text in self.tokenizer.special_tokens().items()}
        self._custom_prefix = prefix_token_id
        if not 0 <= self.prefix_token_id < self.llm.config.vocab_size:
            raise UserError(f"The prefix token {self.prefix_token_id} is outside the vocabulary; choose another.")
        self._encoded = functools.lru_cache(maxsize=256)(self._encode)  # successive requests often share a context

    # ---- what the harness asks about a model ----

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id."""
        named = self._special.get("eos_token")
        if named is None and not self.tokenizer.eos_ids:
            raise UserError("The checkpoint has no end-of-text token; set eos_token_id in its config.json.")
        return self.tokenizer.eos_ids[0] if named is None else named

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self._custom_prefix is not None:
            return self._custom_prefix
        named = self._special.get("bos_token")
        return self.eot_token_id if named is None else named

    @property
    def max_gen_toks(self) -> int:
        """The most new tokens for tasks that do not set a limit."""
        return _NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests that were built with the chat template."""
        return self.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What results say about the model."""
        weights = list(self.llm.model.parameters())
        return {
            "model_num_parameters": self.llm.config.num_parameters,
            "model_dtype": weights[0].dtype,
            "model_revision": self.revision or "",
            "model_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
            "model_backend": type(self.llm.runner).__name__,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt made from messages; without `add_generation_prompt` the last of them is to be continued."""
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        try:
            return self.tokenizer.render_chat(chat_history, **options)
        except TokenizerError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _log.warning("the chat template takes no system message, so it is left out (%s)", error)
            return self.tokenizer.render_chat(others, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses: a checkpoint without one gets OLMoE-Instruct's."""
        if chat_template is False or chat_template is None:
            return None
        return self.tokenizer.template(chat_template if isinstance(chat_template, str) else None)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; special tokens spelled out in it become these tokens. Only `add_bos_token` adds anything."""
        ids = self._encoded(string)
        if self._add_bos and add_special_tokens is not False:
            bos = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            if add_special_tokens or not has_bos_prefix(string, bos):
                ids = (self.prefix_token_id, *ids)
        return list(ids[-left_truncate_len:] if left_truncate_len else ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_rendered(text))

    # ---- log-likelihoods ----

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The logarithm of each continuation's probability, and whether greedy decoding would produce it."""
        hidden = disable_tqdm or not self._show_progress or sys.stderr is None or not sys.stderr.isatty()
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=hidden)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of encoded requests."""
        texts, cut = [], 0
        for asked, context, continuation in requests:
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"A continuation of {len(continuation)} tokens after {len(context)} cannot be scored within a "
                    f"context of {self.max_length}: {shown(asked[1] if asked else continuation)}."
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            cut += len(whole) < len(context) + len(continuation)
            texts.append((whole, len(whole) - len(continuation)))
        if cut:
            _log.warning("%d of %d contexts are cut at the start: max_length is %d", cut, len(texts), self.max_length)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        scorer = Scorer(
            self.llm.runner,
            cache_bytes=self.llm.cache_bytes,
            cache_dtype=self.llm.cache_dtype,
            max_rows=self._rows or MOST_RUNS,
            policy=None if self._policy is None else self._policy.resolve(self.llm.config),
        )
        with self._bar(len(texts), "Running loglikelihood requests", disable_tqdm) as bar:
            for number, scored in scorer.score(texts):
                answers[number] = (scored.logprob, scored.greedy)
                asked = requests[number][0]
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answers[number])
                bar.update()
        _log.info("%d of %d tokens ran through the network", scorer.computed_tokens, scorer.given_tokens)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, its windows disjoint and each with as much context as fits."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- texts ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model generates after each context, up to the first of its stop strings."""
        prepared = [self._prepare(*request.args) for request in requests]
        # Neighbours in this order have the most in common, so a small cache holds what they share.
        order = sorted(range(len(prepared)), key=lambda number: prepared[number][0])
        answers = [""] * len(requests)
        completions = self.llm.as_completed(
            [prepared[number][0] for number in order],
            [prepared[number][1] for number in order],
            most_sequences=self._rows,
        )
        with self._bar(len(requests), "Running generate_until requests", disable_tqdm) as bar:
            for place, completion in completions:
                number = order[place]
                answers[number] = self._answer(completion, prepared[number][2])
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                bar.update()
        return answers

    def _prepare(self, context: str, arguments: Mapping[str, Any]) -> tuple[list[int], SamplingParams, list[str]]:
        """The ids of a context, its sampling parameters, and all its stop strings."""
        left = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        until = [*left.pop("until"), self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)]
        most = left.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"{most} new tokens leave no room for a prompt within a context of {self.max_length}; ask for fewer."
            )
        ids = self.tok_encode(context)
        if self._truncation:
            ids = ids[: self.llm.config.max_position_embeddings]
        given: dict[str, Any] = {}
        for name, value in left.items():
            if name in _SAMPLING:
                given[name] = value
            elif name in _RENAMED:
                given[_RENAMED[name]] = value
            elif name not in _IMPLIED and _SINGLE.get(name) != value:
                raise UserError(
                    f"A task asks for the generation argument {name}={shown(value)}, which olmoe does not know; "
                    "change the task's generation_kwargs."
                )
        if given.get("seed") is None:  # the harness seeds torch, so that runs are reproducible
            given["seed"] = int(torch.randint(2**62, ()))
        stop = [text for text in until if text]
        params = SamplingParams(max_new_tokens=most, stop=stop, router_policy=self._policy, **given)
        return ids[-room:] or [self.prefix_token_id], params, until

    def _answer(self, completion: Completion, until: list[str]) -> str:
        """The text of a completion as the harness expects it."""
        ids, mark = completion.token_ids, self.think_end_token
        if isinstance(mark, int):
            if mark in ids:
                ids = ids[len(ids) - ids[::-1].index(mark) :]
            return str(postprocess_generated_text(self.tokenizer.decode(ids).lstrip(), until, None))
        return str(postprocess_generated_text(self.tokenizer.decode(ids), until, mark))

    def _bar(self, total: int, what: str, hidden: bool) -> Any:
        return tqdm(total=total, desc=what, disable=True if hidden or not self._show_progress else None)


def _device(given: str | torch.device | None) -> str | torch.device:
    """The harness's device: its command says cuda:0 whether or not there is one, which its `hf` backend tolerates."""
    if given is None or (str(given).startswith("cuda") and not torch.cuda.is_available()):
        return "auto"
    return given


def _rows(batch_size: int | str | None, most: int | None) -> int | None:
    """The most texts in progress, None for as many as are useful."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return None if most is None else whole_number("max_batch_size", most, least=1)
    number = int(batch_size) if str(batch_size).isdecimal() else batch_size
    return whole_number("batch_size", number, least=1)
