"""The OpenAPI 3.1 document of the HTTP API, made from descriptors, the table of policies and the rules of fields.

Promise: what the document says of a request is what is checked: the same schemas judge every request that comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor import FieldDescriptor

from serving.api.access import POLICIES, SERVICE
from serving.api.fields import IDEMPOTENT, REQUIRED, RULES

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, MethodDescriptor

__all__ = ["PROBLEM_TYPE", "body_schema", "document", "path_fields", "query_schemas"]

PROBLEM_TYPE: Final = "application/problem+json"
_TIMESTAMP: Final = "google.protobuf.Timestamp"
_UNSIGNED: Final = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32}
_SIGNED: Final = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32}
_UNSIGNED_64: Final = {FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64}
_SIGNED_64: Final = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64}
_REFUSALS: Final = {
    "400": "The request does not fit this document.",
    "401": "The key is missing, unknown, revoked or expired.",
    "403": "The key lacks the scope, or is a tenant's where an operator's is needed.",
    "404": "There is no such thing, or none that the key may see.",
    "409": "The ledger refused, or it is there already.",
    "410": "Behind this position alerts may be missing.",
    "413": "The request is too large.",
    "415": "The body is not application/json.",
    "422": "The request fits this document and cannot be meant.",
    "429": "Too many calls run at the same time.",
    "503": "The database or the ledger does not answer.",
    "504": "The call's time is over.",
}
_SUMMARIES: Final = {
    "GetBalance": "What a tenant was granted, spent, and has left",
    "ListUsage": "Tokens and cost, by dimensions and spans of time",
    "GetStatement": "A tenant's charges line by line, and the balance before and after",
    "ListInvoices": "Final invoices, newest first",
    "GetInvoice": "What stands on an invoice",
    "GetInvoiceDocument": "An invoice as JSON, CSV, HTML or PDF",
    "ExplainInvoiceLine": "The requests that a line of an invoice is made of",
    "ListCreditGrants": "A tenant's credit, grant by grant",
    "GrantCredit": "Add credit to a tenant",
    "GetPriceBook": "The price book in effect",
    "ListAlerts": "Alerts, oldest first",
    "WatchAlerts": "Alerts as they come, as server-sent events",
    "AcknowledgeAlert": "Take an alert on",
    "ListKeys": "A tenant's keys, without their secrets",
    "CreateKey": "Make a key; its secret is shown once",
    "RevokeKey": "Make a key open nothing any more",
    "ListTenants": "The tenants that the key may see, with their balances",
    "GetTenant": "Who a tenant is: plan, months, projects, budgets",
    "CreateTenant": "Create a tenant",
    "SetTenantStatus": "Suspend a tenant, or let it go on",
    "GetPipeline": "How far the database is, and what has not come",
    "GetOverview": "What the dashboard shows: of all tenants, or of one",
    "WatchOverview": "The overview again each time that it changes, as server-sent events",
}


def path_fields(path: str) -> list[str]:
    """The fields of a request that stand in a route's path."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def query_schemas(method: MethodDescriptor) -> dict[str, dict[str, Any]]:
    """By name: what may stand in the query of a route that reads."""
    in_path = path_fields(POLICIES[method.name].path)
    return {field.name: _asked(field, method) for field in method.input_type.fields if field.name not in in_path}


def body_schema(method: MethodDescriptor) -> dict[str, Any]:
    """What the body of a route that writes may be."""
    fields = [field for field in method.input_type.fields if field.name != IDEMPOTENT]
    return {
        "type": "object",
        "properties": {field.name: _asked(field, method) for field in fields},
        "required": [name for name in REQUIRED.get(method.input_type.name, ()) if name != IDEMPOTENT],
        "additionalProperties": False,
    }


def path_schemas(method: MethodDescriptor) -> dict[str, dict[str, Any]]:
    """By name: what may stand in a route's path."""
    fields = method.input_type.fields_by_name
    return {name: _asked(fields[name], method) for name in path_fields(POLICIES[method.name].path)}


def header_schema(method: MethodDescriptor) -> dict[str, Any] | None:
    """What may stand in the header Idempotency-Key; None: the route has none."""
    field = method.input_type.fields_by_name.get(IDEMPOTENT)
    return None if field is None else _asked(field, method) | {"minLength": 1}


def document(version: str) -> dict[str, Any]:
    """The whole document."""
    schemas: dict[str, Any] = {
        "Problem": {
            "type": "object",
            "description": "RFC 9457",
            "properties": {
                "type": {"type": "string"},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
            },
            "required": ["type", "title", "status", "detail"],
            "additionalProperties": False,
        }
    }
    paths: dict[str, Any] = {}
    for method in SERVICE.methods:
        policy = POLICIES[method.name]
        _add_message(schemas, method.output_type)
        paths.setdefault(policy.path, {})[policy.verb.lower()] = _operation(method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Taximeter billing API",
            "version": version,
            "description": (
                "Balances, usage, invoices, credit, prices, alerts, keys and tenants. Amounts are decimal texts in currency "
                "units; 64-bit integers are texts; times are RFC 3339 in UTC. The same messages as gRPC's "
                "billing.v1.BillingService."
            ),
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
        },
        "security": [{"key": []}],
    }


def _operation(method: MethodDescriptor) -> dict[str, Any]:
    policy = POLICIES[method.name]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema} for name, schema in path_schemas(method).items()
    ]
    operation: dict[str, Any] = {"operationId": method.name, "summary": _SUMMARIES[method.name], "parameters": parameters}
    required = REQUIRED.get(method.input_type.name, ())
    if policy.writes:
        header = {"name": "Idempotency-Key", "in": "header", "required": IDEMPOTENT in required}
        parameters.append(header | {"schema": header_schema(method)})
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body_schema(method)}}}
    else:
        for name, schema in query_schemas(method).items():
            parameters.append({"name": name, "in": "query", "required": name in required, "schema": schema})
    operation["responses"] = {
        "200": {"description": "The answer", "content": _answers(method)},
        **{
            status: {
                "description": text,
                "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
            for status, text in _REFUSALS.items()
        },
    }
    return operation


def _answers(method: MethodDescriptor) -> dict[str, Any]:
    if method.server_streaming:
        return {"text/event-stream": {"schema": {"type": "string"}}}
    if method.output_type.name == "GetInvoiceDocumentResponse":
        kinds = ("application/json", "text/csv", "text/html", "application/pdf")
        return {kind: {"schema": {}} for kind in kinds}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{method.output_type.name}"}}}


def _add_message(schemas: dict[str, Any], message: Descriptor) -> None:
    if message.name in schemas:
        return
    schemas[message.name] = {}
    schemas[message.name] = {
        "type": "object",
        "properties": {field.name: _field(field, schemas=schemas) for field in message.fields},
        "required": [field.name for field in message.fields if field.is_repeated or not field.has_presence],
        "additionalProperties": False,
    }


def _asked(field: FieldDescriptor, method: MethodDescriptor) -> dict[str, Any]:
    schema = _field(field, asked=True)
    required = field.name in REQUIRED.get(method.input_type.name, ())
    return schema | {"minLength": 1} if required and schema["type"] == "string" and "format" not in schema else schema


def _field(field: FieldDescriptor, schemas: dict[str, Any] | None = None, *, asked: bool = False) -> dict[str, Any]:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _one(entry.fields_by_name["value"], schemas, asked=asked)}
    one = _one(field, schemas, asked=asked)
    if not field.is_repeated:
        return one
    return {"type": "array", "items": one} | ({"maxItems": len(RULES[field.name].choices)} if asked else {})


def _one(field: FieldDescriptor, schemas: dict[str, Any] | None, *, asked: bool) -> dict[str, Any]:
    if field.message_type is not None:
        if field.message_type.full_name == _TIMESTAMP:
            return {"type": "string", "format": "date-time"}
        assert schemas is not None, f"{field.full_name}: a request has no message of its own"
        _add_message(schemas, field.message_type)
        return {"$ref": f"#/components/schemas/{field.message_type.name}"}
    rule = RULES.get(field.name) if asked else None
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"type": "boolean"}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    if field.type in _UNSIGNED | _SIGNED:
        low, high = (0, 2**32 - 1) if field.type in _UNSIGNED else (-(2**31), 2**31 - 1)
        return {"type": "integer", "minimum": rule.least if rule else low, "maximum": rule.most if rule else high}
    if field.type in _UNSIGNED_64:
        # As a body's text or a query's: at most 18 digits always fit.
        return {"type": "string", "pattern": "^[0-9]{1,18}$" if asked else "^[0-9]+$"}
    if field.type in _SIGNED_64:
        return {"type": "string", "pattern": "^-?[0-9]+$"}
    schema: dict[str, Any] = {"type": "string"}
    if rule is not None:
        if rule.choices:
            schema["enum"] = list(rule.choices)
        if rule.chars_max:
            schema["maxLength"] = rule.chars_max
        if rule.pattern:
            schema["pattern"] = rule.pattern
    return schema
