"""Writes a volume of example invoices in every format: `python -m tests.serving.documents FOLDER`, to look at them."""

from __future__ import annotations

import sys
from pathlib import Path

from serving.documents import DocumentFormat, render
from tests.billing.invoice_sheets import american, chinese, japanese, long
from tests.billing.invoice_volume import invoices, volume


def main(folder: Path) -> None:
    """Those that the real step draws, then sheets made for their layout, a draft and a long one among them."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = {f"drawn-{number}": stored for number, stored in enumerate(invoices(volume()), 1)}
    draft = american()
    draft.number = 0
    sheets = {"dollars": american(), "yuan": chinese(), "yen": japanese(), "long": long(120), "draft": draft}
    examples |= {name: sheet.stored() for name, sheet in sheets.items()}
    for name, stored in examples.items():
        for document in DocumentFormat:
            (folder / f"{name}.{document}").write_bytes(render(stored, document))
    print(f"{folder}: {len(examples)} invoices in {len(DocumentFormat)} formats")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
