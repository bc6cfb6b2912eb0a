"""The part of a report that proves: what was cut and what was not, accuracy, verification, environment."""

from __future__ import annotations

from onnx_mdp.reports.pages import Bar, Block, Code, Column, Facts, Section, Table
from onnx_mdp.reports.quantities import NO_NUMBER, long_table, milliseconds, part, percent, ratio
from onnx_mdp.reports.report_file import Report

__all__ = ["evidence_sections"]


def evidence_sections(report: Report) -> tuple[Section | None, ...]:
    """The sections, None where there is nothing to say."""
    return (
        _dimensions(report),
        _frozen(report),
        _accuracy(report),
        _verification(report),
        _environment(report),
        _command(report),
    )


def _dimensions(report: Report) -> Section | None:
    if not report.dimensions:
        return None
    rows = [
        (d.name, d.kind, str(d.size), str(d.kept) if d.kept else "removed", Bar(part(d.kept, d.size)))
        for d in report.dimensions
    ]
    cut = sum(d.kept < d.size for d in report.dimensions)
    before, after = sum(d.size for d in report.dimensions), sum(d.kept for d in report.dimensions)
    said = f"{cut} of {len(rows)} prunable dimensions are cut, {before} → {after} channels."
    numbers = (Column("before", "number"), Column("after", "number"), Column("kept", "bar"))
    table = Table((Column("dimension", "name"), Column("kind"), *numbers), tuple(rows))
    return Section("Dimensions", (said, long_table(table, "dimensions")))


def _frozen(report: Report) -> Section:
    if not report.frozen:
        return Section("Frozen dimensions", ("None: everything with weights could be cut.",))
    rows = [
        (
            str(len(held.dimensions)),
            held.reason + (f" (and {len(held.nodes) - 1} more nodes)" if len(held.nodes) > 1 else ""),
            _some(held.dimensions),
            percent(ratio(held.params, report.params[0])),
            percent(ratio(held.macs, report.macs[0])),
            milliseconds(held.ms, ""),
        )
        for held in report.frozen
    ]
    numbers = tuple(Column(c, "number") for c in ("parameters", "MACs", "ms"))
    columns = (Column("count", "number"), Column("why"), Column("dimensions", "name"), *numbers)
    said = (
        "What stays as wide as it is, and what it holds of the original, by the table. A weight between a "
        "frozen and a prunable dimension counts here too, and still gets smaller."
    )
    return Section("Frozen dimensions", (said, long_table(Table(columns, tuple(rows)), "reasons")))


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _accuracy(report: Report) -> Section:
    title, found = "Accuracy before and after", report.fidelity
    if report.data is None:
        return Section(title, ("Not measured: no --data.",))
    if found is None:
        return Section(title, ("Not measured: there is no pruned model.",))
    whom = f"{found.samples} samples of {report.data}"
    said = (
        f"On {whom}. These are the calibration inputs, by which the plan was made: the pruned model may look "
        "better on them than it is on others. Measure on data of your own before you rely on it."
    )
    blocks: list[Block] = [said]
    if found.accuracy is not None:
        before, after = (percent(share) for share in found.accuracy)
        blocks.append(
            Facts((("top-1 before", before), ("top-1 after", after), ("by output", str(found.scored))))
        )
    elif found.labelled:
        blocks.append("The labels are not used: no output holds one score for each class of each sample.")
    else:
        blocks.append("Accuracy was not measured: the data holds no labels. How far the outputs moved:")
    rows = [
        (
            o.name,
            NO_NUMBER if o.cosine is None else f"{o.cosine:.5f}",
            percent(o.error, 2),
            percent(o.agreement),
        )
        for o in found.outputs
    ]
    columns = (
        Column("output", "name"),
        *(Column(c, "number") for c in ("cosine to the original", "relative error", "same answer")),
    )
    blocks.append(long_table(Table(columns, tuple(rows)), "outputs"))
    blocks.append(
        "Same answer: the largest entry of a row is the same (top-1), or an integer is equal. "
        f"A {NO_NUMBER} stands where there is no such number."
    )
    return Section(title, tuple(blocks))


def _verification(report: Report) -> Section:
    proof = report.proof
    if proof is None:
        return Section("Verification", ("Nothing was cut, so there was nothing to verify.",))
    facts = [
        ("the law", "the pruned model computes what the original computes with the cut channels masked"),
        ("holds", "yes" if proof.verified else "NO"),
        ("worst error", f"{proof.worst:.1e} of the scale; at most {proof.tolerance:.0e} is allowed"),
        ("inputs tried", str(proof.inputs_tried)),
        ("ONNX checker", proof.checker or "no complaint"),
    ]
    if proof.runtime_noise is not None:
        noise = f"the runtime itself differs by {proof.runtime_noise:.1e} of the scale when it optimises"
        facts.append(("noise", noise))
    if proof.judged is not None:
        facts.append(("how", proof.judged))
    if proof.followed:
        facts.append(("ties", "scores within rounding of each other were ordered as the original does"))
    if proof.constant:
        facts.append(("little is proven of", ", ".join(proof.constant) + ": no input changes it"))
    rows = [
        (o.name, f"{o.difference:.1e}", f"{o.scale:.3g}", f"{o.cosine:.4f}", f"{o.moved:.3g}")
        for o in proof.outputs
    ]
    headings = ("worst error", "scale", "cosine to the unpruned", "largest change")
    table = Table((Column("output", "name"), *(Column(c, "number") for c in headings)), tuple(rows))
    said = (
        "The last two columns are no errors: how far pruning moved the output for one random input, before "
        "any change of weights."
    )
    return Section("Verification", (Facts(tuple(facts)), long_table(table, "outputs"), said))


def _environment(report: Report) -> Section:
    told = {name: value for name, value in sorted(report.environment.items()) if value not in (None, "")}
    facts = [(name.replace("_", " "), _plain(value)) for name, value in told.items()]
    seconds = [(stage, f"{spent:.1f} s") for stage, spent in report.seconds.items()]
    seconds.append(("in all", f"{sum(report.seconds.values()):.1f} s"))
    files = Table(
        (Column("file"), Column("name", "name"), Column("SHA-256", "name")),
        tuple((file.what, file.name, file.sha256) for file in report.files),
    )
    said = "Seconds that the prune took, by stage:"
    return Section("Environment", (Facts(tuple(facts)), files, said, Facts(tuple(seconds))))


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _command(report: Report) -> Section:
    return Section("The command", ("As it was given; folders are left out.", Code(report.command)))
