"""Whether a checkpoint is whole: every name, type, shape and stored value of it.

A load checks names, types and shapes, and a few values. `inspect` looks at all values (`checkpoint.values`).
It reads every tensor in file order and in chunks, so that memory does not grow with the checkpoint. The
tokenizer, the template and the configurations are opened by the functions that a load opens them with.
The price: a wrong value that is finite passes. Only a comparison with another checkpoint shows it
(`dgemma.reports.against`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgemma.checkpoint import values
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import read_shard, shards
from dgemma.checkpoint.safetensors import Entry
from dgemma.checkpoint.values import Flaw, Subject
from dgemma.errors import CheckpointError, DgemmaError, visible
from dgemma.files import Progress
from dgemma.loading import Small, open_small
from dgemma.network.spec import GROUPS
from dgemma.reports import against, tables
from dgemma.reports.ties import Finding, find_ties, tied
from dgemma.text.tokenizer import Tokenizer


def inspect(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Everything that is wrong with a checkpoint's folder, as `findings`, and its contents; for JSON.

    An error that keeps the checkpoint from opening is a finding too. Values are checked even then, but by
    their types alone, as the roles of the tensors are unknown: `complete` is false. `notes` are sentences
    about what is odd, but works. `progress(done, total)` counts stored bytes. CheckpointError if a file goes
    away meanwhile.
    """
    small, findings = _small(folder)
    checkpoint, more = _opened(folder)
    findings += [finding for finding in more if finding not in findings]
    if checkpoint:
        entries = list(checkpoint.entries.values())
        findings += _table_findings(checkpoint)
    else:
        entries, broken = _readable(folder)
        # A broken file is also why the checkpoint did not open: say it once.
        said = tuple(f"{folder / file}: " for finding in broken if (file := finding.file))
        findings = broken + [finding for finding in findings if not finding.text.startswith(said)]
    entries.sort(key=lambda entry: (entry.file, entry.offset))
    ties = find_ties(entries)
    known = _subjects(checkpoint) if checkpoint else {}
    findings += _value_findings(entries, known, ties, progress)
    if checkpoint and not findings:
        findings += _record_findings(checkpoint)
    return {
        "ok": not findings,
        "complete": checkpoint is not None,
        "format": checkpoint.layout.name if checkpoint else None,
        "files": len({entry.file for entry in entries}),
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "by_class": by_class(checkpoint) if checkpoint else {},
        "tied_copies": len(ties),
        "text": _text_facts(small) if small else None,
        "findings": [asdict(finding) for finding in findings],
        "notes": _notes(small) if small else [],
    }


def _small(folder: Path) -> tuple[Small | None, list[Finding]]:
    """The small files by the function that a load opens them with, and every error in them."""
    try:
        return open_small(folder), []
    except DgemmaError as error:
        errors = [error]
    try:  # the first error may have hidden the tokenizer's
        Tokenizer.open(folder)
    except DgemmaError as error:
        errors.append(error)
    return None, list(dict.fromkeys(_failure(error) for error in errors))


def _opened(folder: Path) -> tuple[Checkpoint | None, list[Finding]]:
    try:
        return Checkpoint.open(folder, check=False), []
    except DgemmaError as error:
        return None, [_failure(error)]


def _failure(error: DgemmaError) -> Finding:
    return Finding("checkpoint", " ".join(str(error).split()))


def _text_facts(small: Small) -> dict[str, Any]:
    """What text needs: the tokens of the tokenizer, null without one; a template; ids that end a reply."""
    tokenizer = small.tokenizer
    return {
        "tokens": tokenizer.raw.get_vocab_size() if tokenizer else None,
        "chat_template": bool(tokenizer and tokenizer.template),
        "stop_ids": len(small.generation.stop_ids),
    }


def _notes(small: Small) -> list[str]:
    notes = list(small.notes)
    if small.tokenizer is None:
        notes.append("no tokenizer.json: only token ids can be given")
    elif small.tokenizer.template is None:
        notes.append("no chat template: only token ids can be given")
    return notes


def _readable(folder: Path) -> tuple[list[Entry], list[Finding]]:
    """The tensors of every file that can be read, and what is wrong with the other files."""
    entries: list[Entry] = []
    findings = []
    try:
        files = shards(folder)
    except CheckpointError:  # an unusable index, which is a finding already
        files = []
    for file in files:
        try:
            entries += read_shard(file)
        except CheckpointError as error:
            findings.append(Finding("file", " ".join(str(error).split()), file=file.name))
    return entries, findings


def _table_findings(checkpoint: Checkpoint) -> list[Finding]:
    contradictions = [Finding("quantization", text) for text in checkpoint.contradictions()]
    return contradictions + [
        Finding(
            fault.kind,
            f"{fault.kind}: {fault.text}",
            fault.name,
            fault.file.name if fault.file else None,
        )
        for fault in checkpoint.faults()
    ]


def _subjects(checkpoint: Checkpoint) -> dict[str, Subject]:
    """What to look for in every tensor by name, without tensors of the wrong type or shape."""
    wrong = {fault.name for fault in checkpoint.faults()}
    sources = checkpoint.sources.values()
    return {
        subject.entry.name: subject
        for source in sources
        for subject in values.subjects(source, checkpoint.entries, wrong)
    }


def _value_findings(
    entries: list[Entry],
    known: Mapping[str, Subject],
    ties: Mapping[str, Entry],
    progress: Progress | None,
) -> list[Finding]:
    findings: list[Finding] = []
    total, done = sum(entry.nbytes for entry in entries), 0
    for entry in entries:
        flaws = values.examine(known.get(entry.name) or values.subject(entry))
        # Where roles are known, a tensor without one is a finding already: its zeros mean nothing.
        findings += _as_findings([f for f in flaws if f.kind != "dead" or not known or entry.name in known])
        if entry.name in ties and (finding := tied(entry, ties[entry.name])):
            findings.append(finding)
        done += entry.nbytes
        if progress:
            progress(done, total)
    return findings


def _as_findings(flaws: list[Flaw]) -> list[Finding]:
    return [
        Finding(flaw.kind, flaw.text, flaw.entry.name, flaw.entry.file.name, flaw.count, flaw.first)
        for flaw in flaws
    ]


def _record_findings(checkpoint: Checkpoint) -> list[Finding]:
    """What putting quantized tensors together finds: a load does it, so that it must be done here, too."""
    findings = []
    for name, source in checkpoint.sources.items():
        try:
            if source.form:
                checkpoint.read(name)
        except DgemmaError as error:
            findings.append(_failure(error))
    return findings


def scale_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The findings in scales, biases and factors alone: a ninth of a quantized checkpoint, or less."""
    roles = {piece.name: piece.role for source in checkpoint.sources.values() for piece in source.pieces}
    for name, subject in _subjects(checkpoint).items():
        if roles[name] in ("scales", "biases", "factor"):
            yield from _as_findings(values.examine(subject))


def by_class(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Parameters, stored bytes and forms (as `parse_form` names them, or a type) of each class."""
    found: dict[str, dict[str, Any]] = {}
    for source in checkpoint.sources.values():
        entries = [checkpoint.entries[p.name] for p in source.pieces if p.name in checkpoint.entries]
        if entries:
            own = found.setdefault(source.param.group, {"parameters": 0, "bytes": 0, "forms": []})
            own["parameters"] += source.param.size
            own["bytes"] += sum(entry.nbytes for entry in entries)
            form = str(source.form or entries[0].dtype.lower())
            if form not in own["forms"]:
                own["forms"].append(form)
    return {group: found[group] for group in GROUPS if group in found}


# ---- as text ------------------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """The report of `inspect`, with its "model" and the comparison "against" another, as text."""
    parts = [_contents_text(report)]
    if found := report.get("against"):
        parts.append(against.text(found))
    parts.append(_findings_text(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _contents_text(report: dict[str, Any]) -> list[str]:
    head = [visible(report["model"]), f"  format   {report['format'] or 'unknown'}"]
    tensors = f"{report['tensors']:,} in {_number(report['files'], 'file')}, {tables.amount(report['bytes'])}"
    head.append(f"  tensors  {tensors}")
    if facts := report["text"]:
        tokens = "no tokenizer" if facts["tokens"] is None else _number(facts["tokens"], "token")
        template = "a chat template" if facts["chat_template"] else "no chat template"
        head.append(f"  text     {tokens}, {template}, {_number(facts['stop_ids'], 'stop id')}")
    if report["tied_copies"]:
        head.append(f"  copies   {report['tied_copies']:,} of tied tensors, held against them")
    if not report["by_class"]:
        return head
    rows = [["parameters", "", "on disk", "as"]]
    for group, own in report["by_class"].items():
        row = [
            f"  {group}",
            tables.count(own["parameters"]),
            tables.amount(own["bytes"]),
            ", ".join(own["forms"]),
        ]
        rows.append(row)
    return [*head, "", *tables.columns(rows)]


def _findings_text(report: dict[str, Any]) -> list[str]:
    lines = [f"note: {note}" for note in report["notes"]]
    if not report["complete"]:
        lines.append("The checkpoint does not open, so values were checked by their types alone.")
    found = report["findings"]
    if not found:
        return [
            *lines,
            "nothing wrong: names, types, shapes, values, tied copies and small files are as they should be",
        ]
    return [*lines, _number(len(found), "finding"), *(f"  {visible(finding['text'])}" for finding in found)]


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"
