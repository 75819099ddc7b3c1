"""The model card (README.md of a Hugging Face repository) that a model directory is pushed with.

All of it comes from the manifest: what the model is made of, its sizes, what the export measured,
licences, and how to run it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from tinyalign.runtime.manifest import MANIFEST_NAME, Manifest

COMPONENTS = ("vision", "connector", "compressor", "rag_connector", "lm")
# The hub's names of licences; what is none of them is "other".
LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "llama2", "llama3", "llama3.1", "llama3.2", "gemma",
}  # fmt: skip


def model_card(manifest: Manifest, repo: str) -> str:
    """The card as Markdown, with the metadata that the hub reads in front."""
    lm = manifest.lm
    memory = (
        "It has a memory bank: pictures and texts that are added to it are used by the very next "
        "answer, without training."
        if manifest.compressor
        else "It has no memory bank."
    )
    parts = [
        front_matter(manifest),
        f"# {in_line(manifest.name)}",
        "A vision-language model for tinyalign, which runs it on a CPU with onnxruntime. It "
        f"answers a question about a picture. {memory}",
        "## Run it",
        "The commit is listed under *Files and versions*, *History*.",
        fenced(
            f"tinyalign-share pull {repo} my-model --revision COMMIT\n"
            'tinyalign-infer photo.jpg "What is this?" --model my-model'
        ),
        "## What it is made of",
        table(("component", "weights", "size"), component_rows(manifest)),
        f"Pictures of {manifest.image.size} x {manifest.image.size} pixels become "
        f"{manifest.connector.tokens} tokens of the language model, which has {lm.layers} layers "
        f"of width {lm.width}, a vocabulary of {lm.vocab} and a context of {lm.context} tokens. "
        f"Memory banks for it have the fingerprint `{in_line(manifest.fingerprint)}`.",
        "## What the export measured",
        *quality_parts(manifest),
        "## Licences",
        table(
            ("part", "licence", "from"),
            [(licence.part, licence.name, licence.source) for licence in manifest.licences],
        ),
        f"Every file's size and SHA-256 are in `{MANIFEST_NAME}`; pulling checks them.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(manifest: Manifest) -> str:
    """The card's metadata. Parts under several licences make a model under none of them alone."""
    names = {licence.name.lower() for licence in manifest.licences}
    one = names.pop() if len(names) == 1 else "several"
    lines = ["---"]
    if one in LICENCES:
        lines.append(f"license: {one}")
    else:
        name = re.sub("[^a-z0-9.]+", "-", one).strip("-") or "unknown"
        lines += ["license: other", f"license_name: {name}"]
    lines += ["library_name: tinyalign", "pipeline_tag: image-text-to-text", "tags:"]
    lines += ["- onnx", "- on-device", "- memory" if manifest.compressor else "- vision-language"]
    return "\n".join([*lines, "---"])


def component_rows(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Each component with its precision and the size of its files, then all other files."""
    rows, total = [], 0
    for name in COMPONENTS:
        files = [entry for entry in manifest.files if entry.path.split(".")[0] == name]
        if files:
            size = sum(entry.bytes for entry in files)
            rows.append(
                (name.replace("_", " "), manifest.precisions.get(name, ""), megabytes(size))
            )
            total += size
    whole = sum(entry.bytes for entry in manifest.files)
    rows.append(("tokens, keys, bank", "", megabytes(whole - total)))
    return [*rows, ("all", "", megabytes(whole))]


def quality_parts(manifest: Manifest) -> list[str]:
    """What the manifest keeps under `quality`: in words what is known, the rest as it is."""
    quality = dict(manifest.quality)
    if not quality:
        return ["Nothing."]
    parts = []
    answers = quality.get("answers")
    if isinstance(answers, dict) and {"prompts", "equal", "tokens", "same_choice"} <= set(answers):
        parts.append(
            f"Of {answers['prompts']} greedy answers {answers['equal']} are those of the torch "
            f"model, and {answers['same_choice']} of {answers['tokens']} tokens are its choice."
        )
        del quality["answers"]
    if "accepted_loss" in quality:
        parts.append("**It was exported although it lost more than the export allows.**")
        del quality["accepted_loss"]
    components = quality.get("components")
    if isinstance(components, list) and all(isinstance(row, dict) for row in components):
        columns = list(dict.fromkeys(key for row in components for key in row))
        rows = [tuple(str(row.get(key, "")) for key in columns) for row in components]
        parts.append(table([column.replace("_", " ") for column in columns], rows))
        del quality["components"]
    if quality:
        parts.append(fenced(json.dumps(quality, indent=1, ensure_ascii=False)[:4000]))
    return parts


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(in_line, line))} |" for line in lines)


def in_line(text: str) -> str:
    """A text that stays in its line, or in its cell of a table, and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def fenced(text: str) -> str:
    """A block of code."""
    return f"```\n{text.replace('```', '')}\n```"


def megabytes(count: int) -> str:
    """A size for people."""
    return f"{count / 1e6:.1f} MB"
