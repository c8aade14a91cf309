"""The page of protocols, from the .proto files: what goes over topics and gRPC, field by field."""

from __future__ import annotations

import re
from pathlib import Path

from taximeter.reference.markdown import cell, code, table

__all__ = ["protocols_page"]

_BLOCK = re.compile(r"(message|enum|service) (\w+) \{(\})?")
_FIELD = re.compile(r"((?:repeated |optional )?(?:map<[^>]+>|[\w.]+)) (\w+) = (\d+)")
_VALUE = re.compile(r"([A-Z][A-Z0-9_]*) = (\d+)")
_RPC = re.compile(r"rpc (\w+)\(([\w. ]+)\) returns \(([\w. ]+)\)")
_HEADS = {
    "message": ("field", "number", "type", "says"),
    "enum": ("value", "number", "", "says"),
    "service": ("call", "", "takes → gives", "says"),
}

_INTRODUCTION = """\
Protobuf, in `proto/`. Topics: `usage.events` carries `UsageBatch`, `billing.commands` `SignedCommand`, `usage.ledger`
`LedgerRecord`, `billing.accounts` `AccountUpdate`, `billing.keys` `ApiKey`, `billing.prices` `PriceBook`,
`usage.progress` `Progress`, `billing.alerts` `Alert`, `usage.rejected` `RejectedInput`. What may run beside what:
`../operating.md`."""


def protocols_page(folder: Path) -> str:
    """Every file with its messages, enumerations and services; comments are what the file says."""
    sections = ["# Protocols", _INTRODUCTION]
    for path in sorted(folder.rglob("*.proto")):
        sections += [f"## {path.relative_to(folder).as_posix()}", *_file(path.read_text())]
    return "\n\n".join(sections)


def _file(text: str) -> list[str]:
    sections: list[str] = []
    said: list[str] = []
    # From the outside to the inside: kind, name, its rows. A oneof's fields are its message's.
    open_blocks: list[tuple[str, str, list[tuple[str, str, str, str]]]] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("//"):
            said.append(line.removeprefix("//").strip())
            continue
        comment, said = " ".join(said), []
        if found := _BLOCK.match(line):
            name = ".".join([*(name for _, name, _ in open_blocks if name), found[2]])
            sections += [f"### {found[1]} {name}", *([cell(comment)] if comment else [])]
            if not found[3]:
                open_blocks.append((found[1], found[2], []))
        elif line.startswith("oneof"):
            open_blocks.append(("oneof", "", []))
        elif line == "}" and open_blocks:
            _close(open_blocks, sections)
        elif open_blocks and (row := _row(_kind(open_blocks), line, comment)) is not None:
            _rows(open_blocks).append(row)
    return sections


def _close(open_blocks: list[tuple[str, str, list[tuple[str, str, str, str]]]], sections: list[str]) -> None:
    kind, name, rows = open_blocks.pop()
    if kind == "oneof" or not rows:
        return
    title = f"### {kind} {'.'.join([*(outer for _, outer, _ in open_blocks if outer), name])}"
    place = sections.index(title) + 1
    # Behind its comment, before what is nested in it.
    has_comment = place < len(sections) and not sections[place].startswith(("###", "|"))
    sections.insert(place + has_comment, table(_HEADS[kind], rows))


def _kind(open_blocks: list[tuple[str, str, list[tuple[str, str, str, str]]]]) -> str:
    return next(kind for kind, _, _ in reversed(open_blocks) if kind != "oneof")


def _rows(open_blocks: list[tuple[str, str, list[tuple[str, str, str, str]]]]) -> list[tuple[str, str, str, str]]:
    return next(rows for kind, _, rows in reversed(open_blocks) if kind != "oneof")


def _row(kind: str, line: str, comment: str) -> tuple[str, str, str, str] | None:
    if kind == "service" and (found := _RPC.match(line)):
        return code(found[1]), "", code(f"{found[2]} → {found[3]}"), cell(comment)
    if kind == "enum" and (found := _VALUE.match(line)):
        return code(found[1]), found[2], "", cell(comment)
    if kind == "message" and (found := _FIELD.match(line)):
        return code(found[2]), found[3], code(found[1]), cell(comment)
    return None
