"""docs/rfc_38744.md: its snippets, run as one program, print what stands below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="needs the real vLLM")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm.__version__.startswith("0.33."), reason="the page is about vLLM 0.33.0"),
]

PAGE = Path(__file__).parents[2] / "docs" / "rfc_38744.md"
SNIPPET = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n^```(?P<kind>figures)?\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
END_OF_SNIPPET = "---- end of snippet ----"
FIGURE = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class Snippet:
    """A snippet of the page.

    Attributes:
        heading: of the section that it stands in.
        code: the snippet.
        figures: whether it prints figures, which differ from run to run.
        printed: what stands below it.
    """

    heading: str
    code: str
    figures: bool
    printed: str


def snippets() -> list[Snippet]:
    text = PAGE.read_text()
    return [
        Snippet(
            heading=re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)[-1],
            code=match["code"],
            figures=match["kind"] == "figures",
            printed=match["printed"] or "",
        )
        for match in SNIPPET.finditer(text)
    ]


SNIPPETS = snippets()


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each snippet prints."""
    program = tmp_path_factory.mktemp("page") / "page.py"  # vLLM and torch read the sources of functions
    program.write_text("".join(f"{snippet.code}\nprint({END_OF_SNIPPET!r})\n" for snippet in SNIPPETS))
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}  # the log goes to stdout
    if not torch.cuda.is_available():
        environment.setdefault("VLLM_TARGET_DEVICE", "cpu")
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *parts, rest = run.stdout.split(f"{END_OF_SNIPPET}\n")
    assert (len(parts), rest) == (len(SNIPPETS), "")
    return dict(zip(SNIPPETS, parts, strict=True))


def test_the_page_has_snippets_and_figures():
    assert len(SNIPPETS) > 5
    assert [snippet.figures for snippet in SNIPPETS].count(True) == 1
    assert PAGE.read_text().count("```") == 2 * (len(SNIPPETS) + sum(bool(snippet.printed) for snippet in SNIPPETS))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.heading)
def test_a_snippet_prints_what_stands_below_it(snippet, printed):
    actual, expected = printed[snippet], snippet.printed
    if snippet.figures:
        assert FIGURE.search(expected)
        actual, expected = FIGURE.sub("#", actual), FIGURE.sub("#", expected)
    assert actual == expected
