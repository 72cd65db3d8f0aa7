"""The text of a filter, parsed (docs/search.md)."""

import re
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

from hashdist.ground.errors import InvalidInput
from hashdist.index.search.filters import COMPARE, LIST_OPERATORS, MOST_CONDITIONS, Filter, column, ids, keys

_TOKEN = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|(<=|>=|==|!=|<|>|,)|([^\s,<>=!'"]+))""")


class _Token(NamedTuple):
    text: str
    kind: Literal["quoted", "sign", "word"]


def parse(text: str) -> Filter:
    """A filter from text: conditions joined by `and`.

    `NAME == V`, also `!=`, `<`, `<=`, `>`, `>=`; `NAME between V and V`; `NAME in V,V`; `NAME not in V,V`;
    `NAME all V,V` (lists only). NAME is a column, `label`, `key` or `id` (the latter two with ==, !=, in and not in).
    V is a number, true, false, a word, or text in quotes.

    Raises InvalidInput saying where it stops making sense.
    """
    tokens = _tokens(text)
    conditions: list[Filter] = []
    at = 0
    while True:
        made, at = _condition(text, tokens, at)
        conditions.append(made)
        if len(conditions) > MOST_CONDITIONS:
            raise InvalidInput(f"a filter may have at most {MOST_CONDITIONS} conditions; ask `NAME in V,V` for several")
        if at == len(tokens):
            return reduce(Filter.__and__, conditions)
        if tokens[at] != ("and", "word"):
            raise _misread(text, tokens, at, "`and` or the end")
        at += 1


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if not found:
            raise InvalidInput(f"the filter {text!r}: cannot read {text[at:].strip()!r}")
        single, double, sign, word = found.groups()
        if sign or word:
            tokens.append(_Token(sign or word, "sign" if sign else "word"))
        else:
            tokens.append(_Token(single if single is not None else double, "quoted"))
        at = found.end()
    return tokens


def _condition(text: str, tokens: list[_Token], at: int) -> tuple[Filter, int]:
    if at >= len(tokens) or tokens[at].kind == "sign":
        raise _misread(text, tokens, at, "the name of a column, `key` or `id`")
    name, at = tokens[at].text, at + 1
    operator: Any = tokens[at].text if at < len(tokens) and tokens[at].kind != "quoted" else ""
    if operator == "not" and at + 1 < len(tokens) and tokens[at + 1] == ("in", "word"):
        operator, at = "not in", at + 1
    if operator not in (*COMPARE, "between", *LIST_OPERATORS):
        raise _misread(text, tokens, at, f"one of {', '.join([*COMPARE, 'between', *LIST_OPERATORS])}")
    values, at = _values(text, tokens, at + 1, operator)
    if name not in ("key", "id"):
        return column(name, operator, values if len(values) > 1 or operator in LIST_OPERATORS else values[0]), at
    if operator not in ("==", "!=", "in", "not in"):
        raise InvalidInput(f"the filter {text!r}: `{name}` is asked for by ==, !=, in and not in, not by {operator}")
    keep = operator in ("==", "in")
    if name == "key":
        return keys(map(str, values), keep=keep), at
    if not all(isinstance(value, int) for value in values):
        raise InvalidInput(f"the filter {text!r}: an id is a whole number, found {values}")
    return ids(values, keep=keep), at


def _values(text: str, tokens: list[_Token], at: int, operator: str) -> tuple[list[Any], int]:
    joint = {"between": _Token("and", "word")}.get(operator, _Token(",", "sign"))
    values: list[Any] = []
    while True:
        if at >= len(tokens) or tokens[at].kind == "sign":
            raise _misread(text, tokens, at, "a value")
        values.append(_value(tokens[at]))
        at += 1
        if operator in COMPARE or (operator == "between" and len(values) == 2):
            return values, at
        if at == len(tokens) or tokens[at] != joint:
            if operator == "between":
                raise _misread(text, tokens, at, "`and` and a second value")
            return values, at
        at += 1


def _value(token: _Token) -> Any:
    if token.kind == "quoted":
        return token.text
    if token.text in ("true", "false"):
        return token.text == "true"
    for number in (int, float):
        try:
            return number(token.text)
        except ValueError:
            continue
    return token.text


def _misread(text: str, tokens: Sequence[_Token], at: int, wanted: str) -> InvalidInput:
    found = f"found {tokens[at].text!r}" if at < len(tokens) else "found the end"
    return InvalidInput(f"the filter {text!r}: {wanted} must come next, {found}")
