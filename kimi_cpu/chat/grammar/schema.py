"""JSON schemas of strangers: checked, and brought into the form that llguidance compiles.

A grammar made from a schema must accept nothing that the schema forbids once the JSON is parsed,
and compiling it must cost little whatever the schema. So this module

- bounds size, nesting, literals, and how many patterns can meet in one string (intersecting many
  regular expressions takes time exponential in their number);
- refuses what llguidance cannot enforce, by name, and drops what asserts nothing (`title`,
  `x-...`, unknown formats: by JSON Schema 2020-12 these never make a value invalid);
- rewrites what it can say otherwise: `$ref`s within oneOf are resolved, so that options with
  different tags are seen to be disjoint; some keywords become others (`rewriting.py`); lengths
  become part of a pattern that counts anyway; bounds and literals that a double cannot hold
  exactly are rounded inwards or refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from kimi_cpu.chat.grammar.patterns import adapted, with_lengths
from kimi_cpu.chat.grammar.rewriting import rewritten
from kimi_cpu.errors import UserError

#: Bounds of one schema. Real ones of tools have 1-20 KB, depth below 20 and a few hundred nodes.
MAX_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_LITERAL_CHARS = 4096
MAX_PATTERN_PROPERTIES = 32
MAX_PROPERTIES = 1000  # of one object: compiling takes time in their square, 0.1 s for these
#: Patterns below one node that intersects schemas (allOf, or anyOf and $ref with siblings).
MAX_MET_PATTERNS = 8
#: What multipleOf counts in, in units of its last digit: a grammar has a state for each remainder.
MAX_MULTIPLE = 1000
#: Lower bounds of lengths. Upper bounds cost nothing and may be any number.
MAX_MINIMUM_COUNT = 100_000

_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}
_FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
}  # fmt: skip
_ONE = {"items", "additionalProperties", "additionalItems"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
_BOUNDS = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}
_COSTLY = _COUNTS | _BOUNDS | {"multipleOf", "pattern", "format", "patternProperties"}
#: Keywords without which another one would be about more than it is.
_DEPENDS = {
    "patternProperties": "additionalProperties", "properties": "additionalProperties",
    "prefixItems": "items",
}  # fmt: skip
#: Keywords that assert something which no grammar of ours enforces.
_UNSUPPORTED = {
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "contains",
    "uniqueItems", "unevaluatedItems", "unevaluatedProperties", "propertyNames", "$dynamicRef",
    "$recursiveRef",
}  # fmt: skip
#: Of those, the values with which they assert nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
}
_EXACT = 2**53  # integers up to here are exact in a double
_INT64 = 9 * 10**18  # a double below the limits of int64, in which llguidance computes

SUPPORTED_HINT = (
    "Supported are type, enum, const, $ref within the schema, anyOf, allOf, oneOf of disjoint "
    'options, and the usual keywords of objects, arrays, strings and numbers. With "strict": '
    "false, what cannot be enforced is ignored."
)


class GrammarError(UserError):
    """A schema, tool_choice or response_format that cannot be enforced.

    param: the field, like `tools[0].function.parameters.properties.tags`.
    """

    def __init__(self, param: str, what: str, hint: str = "") -> None:
        super().__init__(f"{param}: {what}", hint)
        self.param = param


class _TooLargeError(GrammarError):
    """It is not one keyword that is at fault, but all of the schema."""


def prepare(
    schema: Any, where: str, *, root_object: bool = False, strict: bool = True, plain: bool = False
) -> str:
    """The JSON text of an equivalent or narrower schema for llguidance. Raises GrammarError.

    where: the field that holds the schema, for messages.
    root_object: values must be objects, as the arguments of a call are.
    strict: refuse keywords that cannot be enforced or make no sense, instead of leaving them out.
    plain: leave out all patterns, formats, bounds and lengths, too: what compiling may fail for.
    """
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(where, "is not a JSON schema (an object)")
    result = _Preparation(schema, where, strict, plain).run()
    if root_object:
        kinds = result.get("type", "object")
        if "object" not in ([kinds] if isinstance(kinds, str) else kinds):
            raise GrammarError(where, "describes no object", 'Give it "type": "object".')
        result = {"type": "object", **result} | {"type": "object"}
    if not strict:
        result["x-guidance"] = {"coerce_one_of": True}  # as anyOf where options may overlap
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8")) > MAX_BYTES:
        raise GrammarError(where, f"the schema is larger than {MAX_BYTES >> 10} KB")
    return text


class _Preparation:
    def __init__(self, root: Any, where: str, strict: bool, plain: bool) -> None:
        self._root = root
        self._where = where
        self._strict = strict
        self._plain = plain
        self._nodes = 0
        self._visits = 0
        self._inlining: list[str] = []

    def run(self) -> dict[str, Any]:
        result = self._schema(self._root, self._where, 0)
        # llguidance takes `false` only below the root.
        return {"type": "null", "enum": [1]} if result is False else result

    def _schema(self, schema: Any, where: str, depth: int) -> Any:
        self._count(where)
        if depth > MAX_DEPTH:
            raise GrammarError(self._where, f"the schema is nested deeper than {MAX_DEPTH} levels")
        if isinstance(schema, bool):
            return {} if schema else False
        if not isinstance(schema, Mapping):
            raise GrammarError(where, "is not a JSON schema (an object)")
        schema = rewritten(schema)
        result: dict[str, Any] = {}
        for key, value in schema.items():
            with self._leaving_out():
                self._member(key, value, schema, where, depth, result)
        for key, depends in _DEPENDS.items():
            if key in schema and key not in result:  # left out: these would now say more
                result.pop(depends, None)
        self._numbers(result, where)
        self._properties(result, where)
        _merge_lengths(result)
        if len(result.keys() - {"$defs", "definitions"}) > 1 or len(result.get("allOf", ())) > 1:
            self._check_met(schema, where)
        return result

    @contextlib.contextmanager
    def _leaving_out(self) -> Iterator[None]:
        """What cannot be enforced is left out, unless that is an error."""
        try:
            yield
        except GrammarError as error:
            if self._strict or isinstance(error, _TooLargeError):
                raise

    def _member(
        self, key: str, value: Any, schema: Mapping[str, Any], where: str, depth: int,
        result: dict[str, Any],
    ) -> None:  # fmt: skip
        """One keyword of a schema."""
        here = f"{where}.{str(key)[:40]}"
        if key in _UNSUPPORTED:
            self._unsupported(key, value, schema, where)
        elif self._plain and key in _COSTLY:
            return
        elif key in _ONE:
            if key == "items" and isinstance(value, list):
                result[key] = self._list(value, here, depth)
            else:
                result[key] = self._schema(value, here, depth + 1)
        elif key in _LISTS:
            options = _checked(value, list, here, "a list of schemas")
            if not options and key != "prefixItems":
                raise GrammarError(here, "is empty")
            if key == "oneOf":
                options = [self._resolved(option, here) for option in options]
                result[key] = [
                    self._inlined(ref, target, f"{here}[{i}]", depth)
                    for i, (ref, target) in enumerate(options)
                ]
            else:
                result[key] = self._list(options, here, depth)
        elif key in _MAPS:
            result[key] = self._map(key, value, here, depth)
        else:
            self._keyword(key, value, here, result)

    def _list(self, schemas: list[Any], where: str, depth: int) -> list[Any]:
        return [self._schema(s, f"{where}[{i}]", depth + 1) for i, s in enumerate(schemas)]

    def _map(self, key: str, value: Any, where: str, depth: int) -> dict[str, Any]:
        members = _checked(value, Mapping, where, "an object of schemas")
        if key == "patternProperties" and len(members) > MAX_PATTERN_PROPERTIES:
            raise GrammarError(where, f"has more than {MAX_PATTERN_PROPERTIES} patterns")
        if key == "properties" and len(members) > MAX_PROPERTIES:
            raise GrammarError(where, f"has more than {MAX_PROPERTIES:,} members")
        result: dict[str, Any] = {}
        for name, member in members.items():
            here = f"{where}.{str(name)[:40]}"
            if key == "patternProperties":
                name = _pattern(name, here)
            else:
                _check_text(name, here, literal=False)
            if not self._strict:
                result[name] = {}
            with self._leaving_out():
                result[name] = self._schema(member, here, depth + 1)
        return result

    def _keyword(self, key: str, value: Any, where: str, result: dict[str, Any]) -> None:
        """A keyword without schemas in it. Unknown ones assert nothing."""
        if key == "type":
            kinds = value if isinstance(value, list) else [value]
            if not kinds or not all(isinstance(k, str) and k in _TYPES for k in kinds):
                raise GrammarError(where, f"{str(value)[:60]!r} is no type of JSON Schema")
            result[key] = value
        elif key in ("enum", "const"):
            values = _checked(value, list, where, "a list") if key == "enum" else [value]
            if not values:
                raise GrammarError(where, "is empty")
            values = [self._value(v, where, 0) for v in values]
            result[key] = values if key == "enum" else values[0]
        elif key in _COUNTS:
            result[key] = _as_count(key, value, where)
        elif key in _BOUNDS or key == "multipleOf":
            boolean = isinstance(value, bool) and key.startswith("exclusive")  # draft 4
            result[key] = value if boolean else _as_number(value, where)
            if key == "multipleOf":
                if result[key] <= 0:
                    raise GrammarError(where, "is not above 0")
                if _common_multiple([result[key]]) > MAX_MULTIPLE:
                    raise GrammarError(where, f"has more than {MAX_MULTIPLE:,} remainders")
        elif key == "pattern":
            result[key] = _pattern(value, where)
        elif key == "format":
            if _checked(value, str, where, "a string") in _FORMATS:
                result[key] = value
        elif key == "required":
            names = _checked(value, list, where, "a list of names")
            if len(names) > MAX_PROPERTIES:
                raise GrammarError(where, f"has more than {MAX_PROPERTIES:,} names")
            for name in names:
                _check_text(name, where, literal=False)
                self._count(where)
            result[key] = list(dict.fromkeys(names))
        elif key == "$ref":
            if _checked(value, str, where, "a string") != "#" and not value.startswith("#/"):
                raise GrammarError(
                    where,
                    f"{value[:80]!r} is no JSON pointer within this schema",
                    "Put what it refers to under $defs of this schema.",
                )
            if not self._strict and self._target(value) is None:
                raise GrammarError(where, "refers to nothing")
            result[key] = value
        elif key == "$id" and where != f"{self._where}.$id" and str(value)[:1] != "#":
            # would change what the references below it mean
            raise GrammarError(where, "only the root of a schema may have one")

    def _unsupported(self, key: str, value: Any, schema: Mapping[str, Any], where: str) -> None:
        if any(type(value) is type(v) and value == v for v in _NEUTRAL.get(key, ())):
            return
        if key == "if" and not schema.keys() & {"then", "else"}:
            return
        if self._strict:
            raise GrammarError(where, f"the keyword {key!r} is not supported", SUPPORTED_HINT)

    def _properties(self, result: dict[str, Any], where: str) -> None:
        """Numbers of properties: only what holds when keys that nobody declared come twice."""
        declared, required = result.get("properties", {}), result.get("required", [])
        low, high = result.get("minProperties", 0), result.get("maxProperties")
        if low <= len(required):
            result.pop("minProperties", None)
        elif low > len(required) + 1:
            if self._strict:
                raise GrammarError(
                    where,
                    f"the keyword 'minProperties' is supported up to {len(required) + 1} here, one "
                    "more than the required properties",
                    SUPPORTED_HINT,
                )
            result["minProperties"] = len(required) + 1
        closed = result.get("additionalProperties") is False and "patternProperties" not in result
        if high is not None and closed and len({*declared, *required}) <= high:
            del result["maxProperties"]

    def _numbers(self, result: dict[str, Any], where: str) -> None:
        """Bounds as doubles within int64: rounded inwards, never outwards."""
        for key, other in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(result.get(key), bool):  # draft 4: says how to read the other
                exclusive = result.pop(key)
                if exclusive and other in result:
                    result[key] = result.pop(other)
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            if key not in result:
                continue
            sign = 1 if key.endswith("Minimum") or key == "minimum" else -1
            bound = sign * result[key]
            if bound > _INT64:
                if not self._strict:
                    del result[key]
                    continue
                raise GrammarError(f"{where}.{key}", "leaves no number that can be written")
            if bound < -_INT64:
                bound = -_INT64
            elif isinstance(bound, int) and abs(bound) > _EXACT:
                inward = float(bound)
                if inward < bound:
                    inward = math.nextafter(inward, math.inf)
                bound = int(inward)
            result[key] = sign * bound

    def _value(self, value: Any, where: str, depth: int) -> Any:
        """A literal of enum or const, so that its JSON text is read back as the same value."""
        self._count(where)
        if depth > MAX_DEPTH:
            raise GrammarError(self._where, f"the schema is nested deeper than {MAX_DEPTH} levels")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            _check_text(value, where, literal=True)
            return value
        if isinstance(value, int | float):
            value = _as_number(value, where)
            if abs(value) > _EXACT and value == int(value):
                raise GrammarError(where, f"the number {value} is too large for a literal")
            return int(value) if value == int(value) else value
        if isinstance(value, list):
            return [self._value(item, where, depth + 1) for item in value]
        if isinstance(value, Mapping):
            for key in value:
                _check_text(key, where, literal=True)
            return {key: self._value(item, where, depth + 1) for key, item in value.items()}
        raise GrammarError(where, f"a {type(value).__name__} is not JSON data")

    def _resolved(self, option: Any, where: str) -> tuple[str | None, Any]:
        """(ref, its target) of an option that is nothing but a reference; else (None, option)."""
        ref = option.get("$ref") if isinstance(option, Mapping) else None
        if not isinstance(ref, str) or ref in self._inlining or len(_asserting(option)) > 1:
            return None, option
        target = self._target(ref)
        return (ref, target) if target is not None else (None, option)

    def _inlined(self, ref: str | None, schema: Any, where: str, depth: int) -> Any:
        if ref is None:
            return self._schema(schema, where, depth + 1)
        self._inlining.append(ref)
        try:
            return self._schema(schema, where, depth + 1)
        finally:
            self._inlining.pop()

    def _target(self, ref: str) -> Any:
        """What a JSON pointer within the schema points to, or None."""
        node = self._root
        for part in ref[2:].split("/") if ref != "#" else []:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return node

    def _check_met(self, schema: Mapping[str, Any], where: str) -> None:
        """Refuse a node that may intersect too many regular expressions or multiples."""
        if not schema.keys() & _COMBINING:
            return
        met: set[str] = set()
        multiples: set[float] = set()
        seen: set[int] = set()
        todo: list[Any] = [schema]
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            self._visits += 1
            if isinstance(node, list):
                todo += node
            elif isinstance(node, Mapping):
                todo += node.values()
                met |= {node[k] for k in ("pattern", "format") if isinstance(node.get(k), str)}
                if isinstance(node.get("patternProperties"), Mapping):
                    met |= node["patternProperties"].keys()
                if isinstance(node.get("multipleOf"), int | float):
                    multiples.add(node["multipleOf"])
                if isinstance(node.get("$ref"), str):
                    todo.append(self._target(node["$ref"]))
            if len(met) > MAX_MET_PATTERNS or self._visits > 50 * MAX_NODES:
                raise GrammarError(
                    where,
                    f"more than {MAX_MET_PATTERNS} patterns and formats are combined",
                    "Use fewer patterns below allOf, anyOf, oneOf and $ref with siblings.",
                )

        if _common_multiple(multiples) > MAX_MULTIPLE:
            raise GrammarError(where, "multipleOf: the values combined have too many remainders")

    def _count(self, where: str) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _TooLargeError(self._where, f"the schema has more than {MAX_NODES:,} parts")


def _asserting(schema: Mapping[str, Any]) -> set[str]:
    known = {"type", "enum", "const", "pattern", "format", "required", "$ref", "multipleOf"}
    known |= _ONE | _LISTS | _MAPS | _COUNTS | _BOUNDS | _UNSUPPORTED
    return schema.keys() & known


def _checked(value: Any, kind: type, where: str, wanted: str) -> Any:
    if not isinstance(value, kind):
        raise GrammarError(where, f"is not {wanted}")
    return value


def _as_count(key: str, value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise GrammarError(where, "is not a whole number")
    if value < 0:
        raise GrammarError(where, "is below 0")
    if key.startswith("min") and value > MAX_MINIMUM_COUNT:
        raise GrammarError(where, f"is larger than {MAX_MINIMUM_COUNT:,}")
    return int(min(value, 10**9))


def _as_number(value: Any, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrammarError(where, "is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise GrammarError(where, "is not a finite number")
    if abs(value) > 1e300:
        raise GrammarError(where, "is too large")
    return int(value) if value == int(value) and abs(value) <= _EXACT else value


def _common_multiple(values: Iterable[float]) -> int:
    """The least common multiple of positive numbers, in units of the last decimal of any."""
    exact = [Decimal(repr(v)).normalize() for v in values if 0 < v < 1e300]
    digits = max((-int(d.as_tuple().exponent) for d in exact), default=0)
    return math.lcm(*(int(d.scaleb(max(digits, 0))) for d in exact))


def _check_text(text: Any, where: str, *, literal: bool) -> None:
    """A string that must appear in the JSON as it is.

    literal: it is matched as a string, where control characters have no spelling.
    """
    if not isinstance(text, str):
        raise GrammarError(where, "a name that is not a string")
    if len(text) > MAX_LITERAL_CHARS:
        raise GrammarError(where, f"a string is longer than {MAX_LITERAL_CHARS:,} characters")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise GrammarError(where, "a string holds half of a surrogate pair")
    if literal and re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", text):
        raise GrammarError(where, "a string holds a control character")


def _merge_lengths(result: dict[str, Any]) -> None:
    """Lengths beside a pattern of one kind of character become part of it."""
    low, high = result.get("minLength", 0), result.get("maxLength")
    if "pattern" in result and (low or high is not None):
        merged = with_lengths(result["pattern"], low, high)
        if merged is not None:
            result["pattern"] = merged
            result.pop("minLength", None)
            result.pop("maxLength", None)


def _pattern(pattern: Any, where: str) -> str:
    _check_text(_checked(pattern, str, where, "a string"), where, literal=False)
    try:
        return adapted(pattern)
    except ValueError as error:
        raise GrammarError(where, str(error)) from None
