"""The part of a report that proves: what was cut and what was not, accuracy, verification, environment."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_mdp.reports.fidelity import Fidelity
from onnx_mdp.reports.pages import Bar, Block, Code, Column, Facts, Section, Table
from onnx_mdp.reports.quantities import NO_NUMBER, long_table, milliseconds, part, percent, ratio
from onnx_mdp.reports.report_file import Proof, Report

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
    used = (
        "Plan or weights were made by these inputs: the pruned model may look better on them than it is on "
        "others. Measure on data of your own before you rely on it."
    )
    blind = report.criterion == "magnitude" and not report.then
    whom = f"On {found.samples} samples of {report.data}, the calibration inputs."
    said = f"{whom} {'The plan does not depend on them.' if blind else used}"
    rows = [
        (
            o.name,
            NO_NUMBER if o.cosine is None else f"{o.cosine:.5f}",
            percent(o.error, 2),
            percent(o.agreement),
        )
        for o in found.outputs
    ]
    headings = ("cosine to the original", "relative error", "same answer")
    table = Table((Column("output", "name"), *(Column(c, "number") for c in headings)), tuple(rows))
    legend = (
        "Same answer: the largest entry of a row is the same (top-1), or an integer is equal. "
        f"A {NO_NUMBER} stands where there is no such number."
    )
    return Section(title, (said, _scores(found), long_table(table, "outputs"), legend))


def _scores(found: Fidelity) -> Block:
    """Top-1, or why there is none."""
    if found.accuracy is not None:
        before, after = (percent(share) for share in found.accuracy)
        scored = str(found.scored)
        return Facts((("top-1 before", before), ("top-1 after", after), ("by output", scored)))
    if found.labelled:
        return "The labels are not used: no output holds one score for each class of each sample."
    return "Accuracy was not measured: the data holds no labels. How far the outputs moved:"


def _verification(report: Report) -> Section:
    proof = report.proof
    if proof is None:
        return Section("Verification", ("Nothing was cut, so there was nothing to verify.",))
    rows = [
        (
            o.name,
            f"{o.difference:.1e}",
            f"{o.scale:.3g}",
            NO_NUMBER if o.cosine is None else f"{o.cosine:.4f}",
            NO_NUMBER if o.moved is None else f"{o.moved:.3g}",
        )
        for o in proof.outputs
    ]
    headings = ("worst error", "scale", "cosine to the unpruned", "largest change")
    table = Table((Column("output", "name"), *(Column(c, "number") for c in headings)), tuple(rows))
    said = (
        "The last two columns are no errors: how far pruning moved the output for one random input, before "
        "any change of weights."
    )
    return Section(
        "Verification",
        (Facts(tuple(_proven(proof, trained=bool(report.then)))), long_table(table, "outputs"), said),
    )


def _proven(proof: Proof, *, trained: bool) -> Iterator[tuple[str, str]]:
    yield "the law", "the pruned model computes what the original computes with the cut channels masked"
    if trained:
        yield "of", "the model as it was sliced; its weights were changed besides"
    yield "holds", "yes" if proof.verified else "NO"
    yield "worst error", f"{proof.worst:.1e} of the scale; at most {proof.tolerance:.0e} is allowed"
    yield "inputs tried", str(proof.inputs_tried)
    yield "ONNX checker", proof.checker or "no complaint"
    if proof.runtime_noise is not None:
        noise = f"{proof.runtime_noise:.1e} of the scale"
        yield (
            "noise",
            f"the runtime itself differs by {noise} when it optimises, and four times that is allowed",
        )
    if proof.judged is not None:
        yield "how", proof.judged
    if proof.followed:
        yield "ties", "scores within rounding of each other were ordered as the original does"
    if proof.constant:
        yield "little is proven of", f"{', '.join(proof.constant)}: no input changes it"


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
