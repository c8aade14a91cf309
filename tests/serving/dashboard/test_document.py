"""The files of the page as one document: what is put together, and what cannot be."""

from __future__ import annotations

import base64
import hashlib
import re
from graphlib import CycleError
from typing import Any

import pytest

from serving.dashboard.document import assemble
from tests.services.browser import chromium

FILES = {
    "index.html": """<link rel="stylesheet" href="a.css">
<script src="b.js"></script>
<script type="module" src="app.js"></script>
""",
    "a.css": "body { margin: 0 }",
    "b.js": "let first = 1;",
    # The same name in each, and each asks for what another one exports.
    "app.js": """import { twice } from "./lib.js";
import { Box } from "./box.js";
const own = "app";
say(twice(new Box(own).held), own);
""",
    "box.js": """import { twice, unit } from "./lib.js";
const own = "box";
export class Box {
  held = twice(unit) + own;
}
""",
    "lib.js": """const own = "lib";
export const unit = 2;
export function twice(given) {
  return given + given + own;
}
""",
}


def test_modules_keep_their_scopes_and_run_after_what_they_ask_for() -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.evaluate("window.say = (...given) => { window.said = given.join(' '); }")
        page.set_content(assemble(FILES.__getitem__).content)
        assert page.evaluate("window.said") == "4libbox4libboxlib app"


def test_every_part_is_in_the_policy_by_its_hash() -> None:
    found = assemble(FILES.__getitem__)
    for tag in ("style", "script"):
        texts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", found.content, re.DOTALL)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]
        assert f"{tag}-src {' '.join(hashes)};" in found.policy
    changed = assemble({**FILES, "lib.js": FILES["lib.js"].replace("2", "3")}.__getitem__)
    assert changed.policy != found.policy


@pytest.mark.parametrize(
    ("name", "text", "error", "told"),
    [
        ("lib.js", "export default 1;\n", ValueError, r"lib\.js: 'export default 1;'"),
        ("lib.js", "import * as all from './box.js';\n", ValueError, r"lib\.js: .import \* as all"),
        ("lib.js", "const markup = '</SCRIPT>';\n", ValueError, r"app\.js: has '</SCRIPT'"),
        ("a.css", "/* <!-- */", ValueError, r"a\.css: has '<!--'"),
        ("lib.js", 'import { Box } from "./box.js";\n', CycleError, "lib"),
    ],
)
def test_what_cannot_be_put_together_names_the_file(name: str, text: str, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        assemble({**FILES, name: text}.__getitem__)
