"""docs/configuration.md lists every field of a pretraining run, as the code has them.

`PYTHONPATH=.:tests python tests/pipelines/config/test_configuration.py` writes the list anew.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib

from helpers.repository import ROOT

DOC = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- fields -->\n", "<!-- end of fields -->"


def field_docs() -> dict[tuple[str, str], str]:
    """Returns the string under each field, by (class, field)."""
    sources = sorted((ROOT / "pipelines" / "config").glob("*.py"))
    docs = {}
    for node in [node for source in sources for node in ast.parse(source.read_text()).body]:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    docs[node.name, field.target.id] = " ".join(after.value.value.split())
    return docs


def doc_of(docs: dict[tuple[str, str], str], cls: type, field: str) -> str:
    """Returns the string under a field, in the class itself or in one that it inherits from."""
    return next((docs[c.__name__, field] for c in cls.__mro__ if (c.__name__, field) in docs), "")


def field_table() -> str:
    """Returns one Markdown table per section of `PretrainConfig`."""
    from pipelines.config.train import PretrainConfig

    docs, parts = field_docs(), []
    for section in dataclasses.fields(PretrainConfig):
        config = section.default_factory
        rows = [f"### {section.name}", "", "| Flag | Default | Meaning |", "|---|---|---|"]
        for field in dataclasses.fields(config):
            flag = f"--{section.name}.{field.name.replace('_', '-')}"
            meaning = doc_of(docs, config, field.name).replace("|", "\\|")
            rows.append(f"| `{flag}` | `{getattr(config(), field.name)!r}` | {meaning} |")
        parts.append("\n".join(rows))
    return "\n" + "\n\n".join(parts) + "\n\n"


def test_configuration_doc_lists_every_field_as_the_code_has_it():
    text = DOC.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == field_table()


def test_every_field_of_every_job_says_what_it_is():
    docs, seen = field_docs(), set()
    for path in sorted((ROOT / "pipelines" / "config").glob("[!_]*.py")):
        module = importlib.import_module(f"pipelines.config.{path.stem}")
        for cls in vars(module).values():
            own = getattr(cls, "__module__", "") == module.__name__
            if own and cls.__name__.endswith("Config") and cls.__name__ != "PretrainConfig":
                seen.add(cls.__name__)
                for field in dataclasses.fields(cls):
                    assert doc_of(docs, cls, field.name), f"{cls.__name__}.{field.name}"
    assert {"DataConfig", "IngestConfig", "EvaluateConfig", "RunConfig", "SweepConfig"} <= seen


if __name__ == "__main__":
    before, _, rest = DOC.read_text().partition(BEGIN)
    DOC.write_text(before + BEGIN + field_table() + END + rest.partition(END)[2])
