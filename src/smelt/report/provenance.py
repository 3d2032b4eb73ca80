"""Where everything on a page came from: hashes, versions, commits, commands, recipes."""

from importlib.metadata import version

from smelt.report.blocks import Block, Code, Section, Table, Text
from smelt.report.material import Material
from smelt.report.runs import Run


def provenance(material: Material, command: str) -> Section:
    """The last section: enough to make the page again, and what it is about."""
    blocks: list[Block] = [
        Text(
            f"Made by smelt {version('smelt')} from what is listed here, and from nothing else; "
            "the page loads nothing."
        )
    ]
    rows = [_row(run) for run in material.runs]
    if rows:
        blocks.append(Table.of("Runs", rows))
    if material.statistics:
        held = [
            {
                "statistics": one.name,
                "checkpoint": _short(one.checkpoint),
                "text": _short(one.usage.text),
                "tokens": one.usage.num_tokens,
            }
            for one in material.statistics
        ]
        blocks.append(Table.of("Statistics", held))
    if material.results:
        blocks.append(_measured(material))
    for number, bench in enumerate(material.benches):
        facts = [
            (name, str(value)) for name, value in bench.machine.items() if not _is_nested(value)
        ]
        facts += [
            (str(name), str(value)) for name, value in (bench.machine.get("versions") or {}).items()
        ]
        if bench.quiet:
            facts += [(f"quiet: {name}", str(value)) for name, value in bench.quiet.items()]
        file = material.bench_files[number].name
        if facts:
            blocks.append(Table(f"Machine of {file}", ("what", "value"), tuple(facts)))
    blocks += [Code(f"Recipe of {run.name}", run.recipe) for run in material.runs if run.recipe]
    blocks.append(Code("The command that made this page", command))
    return Section("provenance", "Provenance", tuple(blocks))


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _short(digest: object) -> str | None:
    return str(digest)[:16] if digest else None


def _row(run: Run) -> dict[str, object]:
    versions = {name: run.provenance.get(name) for name in ("smelt", "torch", "transformers")}
    plan = run.plan
    return {
        "run": run.name,
        "kind": run.kind,
        "fingerprint": _short(run.fingerprint),
        "made from": run.provenance.get("source"),
        "fingerprint of that": _short(
            plan.checkpoint if plan else run.provenance.get("source_fingerprint")
        ),
        "statistics": _short(plan.statistics if plan else None),
        "text": _short(plan.text if plan else run.training.get("train_text_sha256")),
        **versions,
    }


def _measured(material: Material) -> Table:
    """One row per checkpoint, text and time of the records."""
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for one in material.results:
        key = (one.fingerprint, one.text_sha256, one.time, one.commit or "")
        row = rows.setdefault(
            key,
            {
                "checkpoint": one.checkpoint,
                "fingerprint": _short(one.fingerprint),
                "task": one.task.partition(":")[0],
                "items": one.text_sha256[:16],
                "seed": one.seed,
                "dtype": one.dtype,
                "device": one.device,
                "time": one.time,
                "smelt": one.versions.get("smelt"),
                "commit": one.commit[:12] + "+" * one.commit.endswith("+") if one.commit else None,
            },
        )
        task = one.task.partition(":")[0]
        if task not in str(row["task"]).split(", "):
            row["task"] = f"{row['task']}, {task}"
    files = ", ".join(path.name for path in material.result_files)
    return Table.of(
        "Measurements", list(rows.values()), f"Files: {files}. + after a commit: with changes."
    )
