"""Read a node's attributes against the operator's schema: types checked, defaults filled in, references to a call resolved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, helper

from mgs_core.onnx.errors import damaged, unsupported
from mgs_core.onnx.tensors import to_array


def bound(proto: NodeProto, function: FunctionProto, outer: Mapping[str, AttributeProto]) -> dict[str, AttributeProto]:
    """Return the attributes that the body of a function sees.

    Args:
        proto: the node that calls it.
        function: the function.
        outer: attributes that the caller itself sees.

    Returns:
        Attributes by name: those of the node, else the function's defaults.
    """
    bindings = {attribute.name: attribute for attribute in function.attribute_proto}
    for attribute in proto.attribute:
        resolved = _resolve(attribute, outer)
        if resolved is not None:
            bindings[attribute.name] = resolved
    return bindings


def definition(schema: Any, opset: int) -> FunctionProto:
    """Return the function by which ONNX defines an operator.

    Args:
        schema: of the operator.
        opset: version that the model imports.

    Returns:
        The function, with the operator's default attributes.
    """
    versions = [version for version in schema.function_opset_versions if version <= opset]
    function = FunctionProto()
    function.ParseFromString(schema.get_function_with_opset_version(max(versions)))
    defaults = [each.default_value for each in schema.attributes.values() if each.default_value.type != AttributeProto.UNDEFINED]
    function.attribute_proto.extend(defaults)
    return function


def read_attributes(
    proto: NodeProto, schema: Any, bindings: Mapping[str, AttributeProto], where: str, folder: Path | None, precision: str | None
) -> dict[str, Any]:
    """Return the attributes of a node as Python values; subgraphs stay as they are.

    Args:
        proto: the node.
        schema: of its operator.
        bindings: attributes of the call, in the body of a function.
        where: names the node.
        folder: of external data, or None.
        precision: dtype that replaces floating-point types of tensors, or None.

    Returns:
        Values by name, with the schema's defaults.

    Raises:
        ArgumentError: when one is unknown, doubled, missing or of the wrong type.
        UnsupportedModelError: when one is sparse or a type.
    """
    values: dict[str, Any] = {}
    for attribute in proto.attribute:
        name = attribute.name
        if name in values or name not in schema.attributes:
            raise damaged(where, f"has the attribute {name!r} {'twice' if name in values else 'that its operator does not know'}")
        resolved = _resolve(attribute, bindings)
        if resolved is None:
            continue
        if int(schema.attributes[name].type.value) != resolved.type:
            raise damaged(where, f"has the attribute {name!r} of the wrong type")
        values[name] = _value(resolved, f"attribute {name!r} of {where}", folder, precision)
    for name, declared in schema.attributes.items():
        if name in values:
            continue
        if declared.required:
            raise damaged(where, f"lacks the attribute {name!r}")
        if declared.default_value.type != AttributeProto.UNDEFINED:
            values[name] = _value(declared.default_value, name, None, None)
    return values


def _resolve(attribute: AttributeProto, bindings: Mapping[str, AttributeProto]) -> AttributeProto | None:
    return bindings.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute


def _value(attribute: AttributeProto, where: str, folder: Path | None, precision: str | None) -> Any:
    if attribute.type == AttributeProto.TENSOR:
        return to_array(attribute.t, folder, where, precision)
    if attribute.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS, AttributeProto.TYPE_PROTO):
        raise unsupported(where, "is a sparse tensor or a type", "Save it as a dense tensor.")
    try:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, (str, int, float)) or hasattr(value, "node"):
            return value
        return [entry.decode() if isinstance(entry, bytes) else entry for entry in value]
    except (UnicodeDecodeError, ValueError) as error:
        raise damaged(where, f"cannot be read: {error}") from error
