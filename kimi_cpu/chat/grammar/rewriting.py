"""Keywords that llguidance does not know, said in keywords that it does.

What comes out holds for the same values, or for fewer: `propertyNames`, `dependentRequired`,
`dependentSchemas` (and `dependencies`, their older name), `not` of required properties, listed
values or types, and `if` where it asks for the value of one property that has listed values. All
other uses of them stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Alternatives multiply: more names in one keyword are left as they are.
MAX_NAMES = 4

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_NOTES = {"title", "description", "$comment", "examples", "default"}


def rewritten(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema (one node of it) in other words."""
    schema = _names(schema)
    more: list[Any] = []
    for step in (_dependent, _excluded, _conditional):
        found = step(schema)
        if found is not None:
            schema, added = found
            more += added
    if not more or not isinstance(schema.get("allOf", []), list):
        return schema
    return {**schema, "allOf": [*schema.get("allOf", []), *more]}


def _names(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names that are listed (zod's records do) as properties; those of a pattern by it."""
    names = schema.get("propertyNames")
    if not isinstance(names, Mapping) or schema.keys() & {"properties", "patternProperties"}:
        return schema
    asks = names.keys() - _NOTES - {"type"}
    rest = {k: v for k, v in schema.items() if k not in ("propertyNames", "additionalProperties")}
    others = schema.get("additionalProperties", True)
    if asks == {"pattern"} and names.get("type", "string") == "string":
        by_pattern = {names["pattern"]: others}
        return {**rest, "patternProperties": by_pattern, "additionalProperties": False}
    listed = [names["const"]] if "const" in names else names.get("enum")
    if not isinstance(listed, list):
        return schema
    properties = {name: others for name in listed if isinstance(name, str)}
    return {**rest, "properties": properties, "additionalProperties": False}


def _dependent(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Any]] | None:
    """With a property come others: it is absent, or they are there."""
    rest, more = dict(schema), []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        needs = schema.get(keyword)
        if not isinstance(needs, Mapping) or not 0 < len(needs) <= MAX_NAMES:
            continue
        for name, needed in needs.items():
            if isinstance(needed, list):
                there: Any = {"required": needed}
            else:
                there = {"allOf": [{"required": [name]}, needed]}
            more.append({"anyOf": [_without(name), there]})
        del rest[keyword]
    return (rest, more) if more else None


def _excluded(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Any]] | None:
    excluded = schema.get("not")
    if not isinstance(excluded, Mapping):
        return None
    rest = {key: value for key, value in schema.items() if key != "not"}
    asks = excluded.keys() - _NOTES
    if asks == {"required"}:
        names = excluded["required"]
        if _are_texts(names) and 0 < len(names) <= MAX_NAMES:
            return rest, [{"type": "object"}, {"anyOf": [_without(name) for name in names]}]
    elif asks in ({"enum"}, {"const"}):
        values, listed = _values(schema), _values(excluded)
        if values is not None and listed is not None:
            return {**rest, "enum": _split(values, listed)[1]}, []
    elif asks == {"type"} and "type" not in schema:
        kinds = excluded["type"] if isinstance(excluded["type"], list) else [excluded["type"]]
        if all(kind in _TYPES for kind in kinds):  # without integer, which number contains
            return {**rest, "type": [kind for kind in _TYPES if kind not in kinds]}, []
    return None


def _conditional(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Any]] | None:
    """`if` a property has some of its values: one alternative for these, one for the others."""
    test, properties = schema.get("if"), schema.get("properties")
    if not isinstance(test, Mapping) or not isinstance(properties, Mapping):
        return None
    if schema.get("type") != "object" or test.get("type", "object") != "object":
        return None
    asked, needed = test.get("properties"), test.get("required", [])
    if test.keys() - _NOTES - {"type", "required"} != {"properties"} or not _are_texts(needed):
        return None
    if not isinstance(asked, Mapping) or len(asked) != 1 or not set(needed) <= asked.keys():
        return None
    ((name, value),) = asked.items()
    if not isinstance(value, Mapping):
        return None
    if value.keys() - _NOTES - {"type"} not in ({"enum"}, {"const"}):
        return None
    values, listed = _values(properties.get(name)), _values(value)
    if values is None or listed is None:
        return None
    then, other = schema.get("then", True), schema.get("else", True)
    options = [
        {"allOf": [{"properties": {name: {"enum": some}}, "required": [name]}, follows]}
        for some, follows in zip(_split(values, listed), (then, other), strict=True)
        if some
    ]
    required = schema.get("required", [])
    if not isinstance(required, list):
        return None
    if name not in required:
        options.append({"allOf": [_without(name), other if needed else then]})
    rest = {key: value for key, value in schema.items() if key not in ("if", "then", "else")}
    return rest, [{"anyOf": options}]


def _without(name: str) -> dict[str, Any]:
    return {"properties": {name: False}}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _values(schema: Any) -> list[Any] | None:
    """All values that a schema lists; None if it does not."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    return [True, False] if schema.get("type") == "boolean" else None


def _split(values: list[Any], listed: list[Any]) -> tuple[list[Any], list[Any]]:
    """The values that are listed, and the others."""
    known = {_text(value) for value in listed}
    return (
        [value for value in values if _text(value) in known],
        [value for value in values if _text(value) not in known],
    )


def _text(value: Any) -> str:
    """The same for what JSON Schema calls equal: 1 and 1.0, but not true."""
    try:
        return json.dumps(_whole(value), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return ""  # no JSON: refused where it is looked at


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    return value
