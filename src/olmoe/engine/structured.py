"""Grammars: texts that are sure to parse, because tokens that would break them are never chosen. No torch.

    from olmoe.engine import structured
    llm.generate(prompts, SamplingParams(grammar=structured.json_schema(schema, llm.tokenizer)))

`json_schema`, `json_object`, `regex`, `choice` and `grammar` compile their input for a tokenizer and raise `UserError`
if something is wrong with it. Compiling takes milliseconds, hostile input up to a second: a server calls them in a
thread. Compiled grammars are kept for the next request. The work is done by llguidance (extra `serve`).
"""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from olmoe.engine.json_schemas import LARGEST_REGEX, patterns, prepared
from olmoe.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from olmoe.tokenizer import Tokenizer

# Characters, characters, texts. The time for a lexer of optional letters grows with the square of their number.
LARGEST_GRAMMAR, LARGEST_CHOICE, MOST_CHOICES = 2**15, 2**17, 10_000

# How much of a grammar is kept in memory, and how long a step may take: a request must not hold up the others.
_LIMITS = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# How much may be built from its regular expressions: a schema has one for each property, others write their own.
_FUEL = {"schema": 500_000, "regex": 200_000, "choice": 500_000, "grammar": 200_000}
_PROBES = 2  # steps that are tried when a grammar is compiled: one that is too complex shows it in the first ones
_KEPT = 16  # compiled grammars per tokenizer, each of up to about 40 MB if it is hostile

_log = logging.getLogger("olmoe")
_compilers: weakref.WeakKeyDictionary[Tokenizer, _Compiler] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()


def json_schema(
    schema: object, tokenizer: Tokenizer, *, strict: bool = True, name: str = "The JSON schema"
) -> TextGrammar:
    """JSON that a schema allows, with at most eight spaces in a row.

    `strict` refuses keywords that cannot be enforced (`not`, `uniqueItems`, ...); without it they are dropped with a
    log message, and a text may violate them. `name` is what messages call the schema.
    """
    text = prepared(schema, strict=strict, name=name)
    found = _compile(tokenizer, _library().LLMatcher.grammar_from_json_schema(text), "schema", name)
    for pattern in patterns(text):  # otherwise a text reaches them late, and only then finds them too complex
        try:
            _compiler(tokenizer).master("regex", f"start: {regex_terminal(pattern)}")
        except UserError as error:
            if "too many" in str(error) or "precomputation" in str(error):
                raise UserError(f"{name} cannot be used: {error} (pattern {shown(pattern)}).") from None
    return found


def json_object(tokenizer: Tokenizer) -> TextGrammar:
    """Any JSON object."""
    return json_schema({"type": "object"}, tokenizer)


def regex(pattern: str, tokenizer: Tokenizer) -> TextGrammar:
    r"""Texts that a regular expression matches as a whole. `\d` is 0 to 9; look-around and `\b` are not supported."""
    return _compile(tokenizer, f"start: {regex_terminal(pattern)}", "regex", f"The regex {shown(pattern)}")


def choice(texts: Sequence[str], tokenizer: Tokenizer) -> TextGrammar:
    """One of several texts."""
    return _compile(tokenizer, f"start: {choice_rule(texts)}", "choice", "The choice")


def grammar(text: str, tokenizer: Tokenizer) -> TextGrammar:
    """Texts of a context-free grammar, in Lark's syntax with the rule `start`, or in GBNF with `root ::=`."""
    text = _checked_text("The grammar", text, LARGEST_GRAMMAR)
    if not re.search(r"(?m)^\s*(%llguidance\b|\??start(\s*[.:\[{]))", text) and "::=" in text:
        text = _from_gbnf(text)
    _check_lexemes(text)
    return _compile(tokenizer, text, "grammar", f"The grammar {shown(text)}")


def assembled(text: str, tokenizer: Tokenizer) -> TextGrammar:
    """The grammar of a Lark text that a program has put together from parts that users gave."""
    return _compile(tokenizer, text, "schema", "The grammar")


def regex_terminal(pattern: object) -> str:
    """A regular expression as a terminal of a Lark grammar. Raises `UserError` if it is not a text, or too long."""
    text = _checked_text("The regex", pattern, LARGEST_REGEX)
    return f"/{_library().regex_to_lark(text or '(?:)', 'd')}/"


def choice_rule(texts: object) -> str:
    """Alternatives as a rule of a Lark grammar. Raises `UserError` for anything but a list of texts."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"A choice must be a list of at least one text, not {shown(texts)}.")
    if len(texts) > MOST_CHOICES or sum(map(len, texts)) > LARGEST_CHOICE:
        raise UserError(
            f"A choice has {len(texts)} texts of {sum(map(len, texts))} characters in all; at most {MOST_CHOICES} of "
            f"{LARGEST_CHOICE} are supported."
        )
    unique = dict.fromkeys(_checked_text("A choice", text, LARGEST_CHOICE) for text in texts)
    return " | ".join(json.dumps(text) for text in unique)


class TextGrammar:
    """A language that a text must belong to, for `SamplingParams.grammar`. Made by the functions of this module."""

    def __init__(self, compiler: _Compiler, source: str, kind: str) -> None:
        self._compiler, self._source, self._kind = compiler, source, kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of a {self._kind}, {len(self._source)} characters>"

    def start(self) -> TextState:
        """The state before the first token. Safe in any thread."""
        return TextState(self._compiler, self._kind, self._source)


class TextState:
    """The state of one text in a `TextGrammar`.

    `fill` raises `UserError` if the grammar takes more work or memory than one text may have, or after a token that it
    does not allow; the text cannot continue then.
    """

    def __init__(self, compiler: _Compiler, kind: str, source: str) -> None:
        self._compiler, self._kind, self._source = compiler, kind, source
        self._master = compiler.master(kind, source)
        self._matcher = self._master.deep_copy()
        self._token_ids: list[int] = []
        self.finished: bool = self._matcher.is_stopped()

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next, and EOS if the text may end; every other bit becomes 0."""
        bits = self._matcher.compute_bitmask()
        if self._begun_again():
            bits = self._matcher.compute_bitmask()
        self._check()
        words = self._compiler.words(bits)
        count = min(len(mask), len(words))
        mask[:count] = words[:count]
        mask[count:] = 0

    def accept(self, token_id: int) -> None:
        """Continue after a token that the mask allowed."""
        if token_id in self._compiler.eos_ids:
            self.finished = True
            return
        self._matcher.consume_token(token_id)
        if self._begun_again():
            self._matcher.consume_token(token_id)
        self._token_ids.append(token_id)
        self.finished = self._matcher.is_stopped() and not self._matcher.is_error()

    def _begun_again(self) -> bool:
        """Whether the matcher failed for lack of room, and has read the text again with a fresh lexer.

        Texts of one grammar share its lexer's cached states, and others may have filled it.
        """
        if not self._matcher.is_error() or "too many" not in self._matcher.get_error():
            return False
        self._master = self._compiler.renewed(self._kind, self._source, self._master)
        self._matcher = self._master.deep_copy()
        self._matcher.consume_tokens(self._token_ids)
        return True

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason, count = _reason(self._matcher.get_error()), len(self._token_ids)
        if "doesn't satisfy" in reason:
            raise UserError(f"Token {count} is one that the grammar does not allow there: {reason}.")
        raise UserError(
            f"The grammar is too complex after {count} tokens: {reason}; simplify the schema, regular expression or "
            "grammar."
        )


class _Compiler:
    """The grammars of one tokenizer, and its vocabulary as llguidance keeps it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import numpy as np

        library = _library()
        count = tokenizer.vocab_size
        special = [i for i in range(count) if tokenizer.is_special(i)]
        self.eos_ids = frozenset(i for i in tokenizer.eos_ids if 0 <= i < count)
        tokens = [tokenizer.token_bytes(i) for i in range(count)]
        ends = [i for i in tokenizer.eos_ids if i in self.eos_ids]
        if not ends:  # texts end where nothing may follow, but the library requires an id
            tokens.append(b"")
            special.append(count)
            ends = [count]
        # Tokens without bytes could be written for ever without any progress.
        banned = {i for i, content in enumerate(tokens) if not content} | set(special)
        bits = np.ones(-(-len(tokens) // 32) * 32, dtype=np.uint8)
        bits[len(tokens) :] = 0
        bits[sorted(banned - self.eos_ids)] = 0
        self._allowed = np.packbits(bits, bitorder="little").view(np.int32)
        self._tokenizer = library.LLTokenizer(_Vocabulary(tokenizer, tokens, special, ends[0]), eos_token=ends)
        self._limits = {
            kind: library.LLParserLimits(initial_lexer_fuel=fuel, **_LIMITS) for kind, fuel in _FUEL.items()
        }
        self._masters: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def master(self, kind: str, source: str) -> Any:
        """A matcher that has read nothing, to be copied. Raises `UserError` for a grammar that cannot be used."""
        key = kind, source
        with self._lock:  # one at a time also bounds what hostile grammars use together
            found = self._masters.get(key)
            if found is None:
                found = self._masters[key] = self._build(kind, source)
                while len(self._masters) > _KEPT:
                    self._masters.popitem(last=False)
            self._masters.move_to_end(key)
            return found

    def renewed(self, kind: str, source: str, worn: Any) -> Any:
        """Another matcher in place of a worn one, if nobody has replaced it yet."""
        with self._lock:
            if self._masters.get((kind, source)) is worn:
                del self._masters[kind, source]
        return self.master(kind, source)

    def _build(self, kind: str, source: str) -> Any:
        matcher = _library().LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits[kind])
        self._probe(matcher.deep_copy())
        for warning in matcher.get_grammar_warnings():
            _log.warning("a grammar is not fully enforced: %s", _shortened(str(warning)))
        return matcher

    def words(self, bits: bytes) -> npt.NDArray[np.int32]:
        """A mask from the library, which may have one word too many, without tokens that must never be chosen."""
        import numpy as np

        return np.frombuffer(bits, dtype=np.int32, count=len(self._allowed)) & self._allowed

    def _probe(self, matcher: Any) -> None:
        """Take the first steps. Raises `UserError` if there are none, or if they are too much work."""
        import numpy as np

        for _ in range(_PROBES):
            bits = b"" if matcher.is_error() else matcher.compute_bitmask()
            if matcher.is_error():
                raise UserError(_reason(matcher.get_error()))
            found = np.flatnonzero(np.unpackbits(self.words(bits).view(np.uint8), bitorder="little"))
            if not len(found):
                break
            if matcher.is_stopped() or int(found[0]) in self.eos_ids:
                break
            matcher.consume_token(int(found[0]))


class _Vocabulary:
    """The tokenizer as llguidance reads it. The reference to it is weak, since the tokenizer owns its grammars."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos_id
        self._tokenizer = weakref.ref(tokenizer)
        self._special = frozenset(special)
        self._bytes = {content[0]: i for i, content in enumerate(tokens) if len(content) == 1}

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that must come next: as the model's tokenizer splits it, if they are exactly this text.

        Otherwise its bytes one by one: a tokenizer composes characters, and reads the names of special tokens as such.
        """
        tokenizer, content = self._tokenizer(), text.encode()
        ids = [] if tokenizer is None else tokenizer.encode(text)
        if b"".join(self.tokens[i] for i in ids) == content and self._special.isdisjoint(ids):
            return ids
        return [self._bytes[byte] for byte in content if byte in self._bytes]


def _compile(tokenizer: Tokenizer, source: str, kind: str, name: str) -> TextGrammar:
    """The grammar of a source, compiled once to see that it can be used."""
    compiler = _compiler(tokenizer)
    try:
        compiler.master(kind, source)
    except UserError as error:
        raise UserError(f"{name} cannot be used: {error}.") from None
    return TextGrammar(compiler, source, kind)


def _compiler(tokenizer: Tokenizer) -> _Compiler:
    """The compiler of a tokenizer, made for its first grammar (0.2 s with OLMoE's vocabulary)."""
    with _compilers_lock:
        found = _compilers.get(tokenizer)
        if found is None:
            found = _compilers[tokenizer] = _Compiler(tokenizer)
        return found


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError('Structured output needs llguidance; install it with pip install "olmoe[serve]".') from None
    return llguidance


def _checked_text(what: str, text: object, largest: int) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what} must be a text, not {shown(text)}.")
    if len(text) > largest:
        raise UserError(f"{what} has {len(text)} characters; at most {largest} are supported.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {shown(text)} is not valid Unicode: it holds half a character.") from None
    return text


def _from_gbnf(text: str) -> str:
    """A llama.cpp grammar in Lark's syntax."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the parser may raise anything, IndexError and RecursionError included
        reason = _shortened(str(error)) or type(error).__name__
        raise UserError(f"The grammar {shown(text)} is not GBNF: {reason}.") from None


# What is in a Lark grammar besides names: texts, regular expressions, comments, and special tokens in angle brackets.
_LEXEMES = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/|(<[^<>\n]*>)')


def _check_lexemes(text: str) -> None:
    """Refuse special tokens (they have no text, and the engine itself ends texts) and regexes that are too long."""
    for found in _LEXEMES.finditer(text):
        if found[0][0] == "/" != found[0][1]:
            _checked_text("A regex of the grammar", found[0], LARGEST_REGEX)
        if found[1]:
            raise UserError(
                f"The grammar names the special token {shown(found[1])}, which has no text; put texts in quotes."
            )


def _reason(message: str) -> str:
    """What the library says, as one short line."""
    message = message.replace("<non-verbose/>", "")
    if "NoExtension" in message:
        return "no text belongs to it"
    if "error:" in message and "regex parse error" in message:
        message = message.split("error:")[-1].split("\n")[0]
    return _shortened(message.split("\n   1 |")[0])


def _shortened(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else line[:297] + "..."
