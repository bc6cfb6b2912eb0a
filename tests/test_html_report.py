"""The report of a prune: the JSON is the whole truth, HTML and Markdown only show it, to anybody, offline."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnx
import pytest
from command_line import Run, is_refused
from test_pipeline import NET, Device, biased_table
from test_report import HOSTILE
from zoo import analyse, text_model

from onnx_mdp import pipeline
from onnx_mdp.cli import prune_commands
from onnx_mdp.data.calibration import CalibrationData
from onnx_mdp.errors import SolverError, UsageError
from onnx_mdp.pipeline import PruneResult, prune
from onnx_mdp.plan import PruningPlan
from onnx_mdp.planning import closed_loop
from onnx_mdp.planning.closed_loop import Request
from onnx_mdp.planning.programs import Programs
from onnx_mdp.reports import report_sections
from onnx_mdp.reports.fidelity import fidelity
from onnx_mdp.reports.html_page import html_page
from onnx_mdp.reports.markdown_page import markdown_page
from onnx_mdp.reports.pages import Bar, Page, Section, Table
from onnx_mdp.reports.report import printable
from onnx_mdp.reports.report_contents import Circumstances, report_of
from onnx_mdp.reports.report_file import Report, load_report, report_json
from onnx_mdp.reports.report_sections import report_page
from onnx_mdp.running.runtime import runtime
from onnx_mdp.surgery.verification import Drift

NAMES = (*HOSTILE, "a|b`c``d", "</td></table>", '"onload="x', "]]>&lt;", "../../etc", "*bold*_x_")


def hostile_net() -> onnx.ModelProto:
    proto = text_model(NET)
    for number, node in enumerate(proto.graph.node):
        node.name = f"{NAMES[number % len(NAMES)]} {number}"
    return proto


def inputs(count: int = 6, labels: bool = True) -> CalibrationData:
    rng = np.random.default_rng(0)
    feeds = tuple({"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count))
    named = tuple(rng.integers(0, 10, 1) for _ in range(count)) if labels else None
    return CalibrationData(feeds, "drawn", named)


def on_a_device(patch: pytest.MonkeyPatch, device: Device, bias: Callable[[], float] = lambda: 1.0) -> None:
    """Measure on ``device``, and take the table that is true of it but for a factor for each key."""
    for module in (pipeline, closed_loop):
        patch.setattr(module, "measure_models", device)
    patch.setattr(pipeline, "build_table", lambda structure, *_, **__: biased_table(structure, bias))


def bias() -> Callable[[], float]:
    rng = np.random.default_rng(1)
    return lambda: float(rng.uniform(0.8, 1.2))


@functools.cache
def pruned(ratio: float = 0.5) -> tuple[PruneResult, Circumstances]:
    model, structure = analyse(hostile_net())
    path = Path(__file__).with_name("nobody's model.onnx")
    data = inputs()
    with pytest.MonkeyPatch.context() as patch:
        on_a_device(
            patch, Device(disturb=lambda n, ms: [*ms[:1], *(1.1 * m if n == 1 else m for m in ms[1:])])
        )
        request = Request(target_ratio=ratio, command="onnx-mdp prune 'a b.onnx' --report")
        result = prune(model, structure, request, object(), feeds=data.feeds)  # type: ignore[arg-type]
    around = Circumstances(
        original=model,
        path=Path(__file__),
        output=path,
        runtime=runtime("cpu", 1, []),
        command=request.command,
        criterion="magnitude",
        data=data,
        data_name="drawn.npz",
    )
    return result, around


@functools.cache
def reported(ratio: float = 0.5) -> Report:
    return report_of(*pruned(ratio))


class Seen(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """What a reader sees; a name may be broken."""
        return " ".join(self.texts) + "".join(self.texts)


# The document


def test_html_and_markdown_are_functions_of_the_file(tmp_path: Path) -> None:
    report, path = reported(), tmp_path / "a.report.json"
    path.write_text(report_json(report), encoding="utf-8")
    read = load_report(path)
    assert read == report
    page = report_page(report)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "svg.hashsalt": "other"}):
        again = report_page(read)
        assert html_page(again) == html_page(page)
    assert markdown_page(again) == markdown_page(page)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda text: "", "is not JSON"),
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[1, 2]", "no report"),
        (lambda text: "{}", "no report"),
        (lambda text: '{"keep": {}, "schema_version": 1}', "no report"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "another schema"),
        (lambda text: re.sub(r'"base_ms": [^,]*', '"base_ms": NaN', text), "beyond reason"),
        (lambda text: re.sub(r'"base_ms": [^,]*', '"base_ms": 1e999', text), "beyond reason"),
        (lambda text: re.sub(r'"base_ms": [^,]*', f'"base_ms": {10**30}', text), "beyond reason"),
        (lambda text: re.sub(r'"base_ms": [^,]*', '"base_ms": "fast"', text), "damaged: base_ms"),
        (lambda text: text.replace('"removed": false', '"removed": 3'), "damaged: blocks.0.removed"),
        (lambda text: text.replace('"size"', '"script"'), "damaged: dimensions.0.size"),
        (lambda text: text.replace('"command"', '"extra": 1, "command"', 1), "holds what no report holds"),
        (lambda text: "[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, damage: Callable[[str], str], fragment: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(damage(report_json(reported())), encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(fragment)):
        load_report(path)


def holes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document with one of its values after the other gone."""
    for name, value in document.items():
        empty: Any = [] if isinstance(value, list) else {} if isinstance(value, dict) else None
        yield {**document, name: empty}


def test_whatever_a_valid_file_lacks_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for figure in ("layers_svg", "front_svg"):  # half a second each; they are drawn in the other tests
        monkeypatch.setattr(report_sections, figure, lambda *_, **__: "<svg/>")
    path, shown = tmp_path / "report.json", 0
    for document in holes(json.loads(report_json(reported()))):
        path.write_text(json.dumps(document), encoding="utf-8")
        try:
            report = load_report(path)
        except UsageError:
            continue
        page = report_page(report)
        assert html_page(page).startswith("<!doctype html>")
        assert markdown_page(page).startswith("# ")
        shown += 1
    assert shown > 15


# What it says


def test_every_layer_dimension_reason_output_and_round_is_there() -> None:
    report = reported()
    html, markdown = Seen(html_page(report_page(report))).text, markdown_page(report_page(report))
    assert report.layers
    assert report.frozen
    assert report.fidelity is not None
    names = [
        *(layer.name for layer in report.layers),
        *(dimension.name for dimension in report.dimensions),
        *(operation.name for operation in report.costs.operations),  # type: ignore[union-attr]
        *(output.name for output in report.fidelity.outputs),
    ]
    for name in names:
        assert printable(name) in html
        assert printable(name).replace("|", "\\|") in markdown
    assert all(printable(part.reason) in html for part in report.frozen)
    assert report.command in html
    assert report.command in markdown
    assert len(report.rounds) == pruned()[0].iterations > 1


def test_one_round_is_the_delivered_one() -> None:
    report = reported()
    (delivered,) = [r for r in report.rounds if r.delivered]
    assert (delivered.predicted_ms, delivered.measured_ms) == (report.predicted_ms, report.measured_ms)


def test_milliseconds_add_up_to_what_was_measured() -> None:
    page = report_page(reported())
    section = next(s for s in page.sections if s.title.startswith("Where the milliseconds"))
    kinds, every = (block for block in section.blocks if isinstance(block, Table))
    for after, total in enumerate((reported().base_ms, reported().measured_ms)):
        outside = float(str(kinds.rows[-1][1 + after]))
        assert sum(float(str(row[1 + after])) for row in kinds.rows) == pytest.approx(total, abs=2e-3)
        assert sum(float(str(row[2 + after])) for row in every.rows) + outside == pytest.approx(
            total, abs=2e-3
        )


def test_the_front_rises_and_holds_the_chosen_plan() -> None:
    front = reported().front
    assert front is not None
    assert len(front.points) > 5
    assert list(front.points) == sorted(front.points)
    values = [value for _, value in front.points]
    assert values == sorted(values)
    assert front.points[-1] == pytest.approx((reported().base_ms, 1.0), rel=1e-3)
    ms, value = front.chosen or (0.0, 0.0)
    assert max(v for m, v in front.points if m <= ms) <= value + 1e-3
    assert min(v for m, v in front.points if m >= ms) >= value - 1e-3


def test_nothing_is_claimed_that_was_not_measured() -> None:
    result, around = pruned()
    bare = report_of(result, replace(around, data=None, data_name=None))
    assert "Not measured: no --data." in html_page(report_page(bare))
    blind = report_of(result, replace(around, data=inputs(labels=False)))
    page = html_page(report_page(blind))
    assert "Accuracy was not measured: the data holds no labels." in page
    assert "top-1 before" not in page
    assert "drawn.npz, the calibration inputs. The plan does not depend on them." in page
    ranked = html_page(report_page(report_of(result, replace(around, criterion="drift"))))
    assert "Plan or weights were made by these inputs" in ranked
    impossible = report_of(replace(result, status="infeasible", plan=None, model=None, evidence=None), around)
    page = html_page(report_page(impossible))
    assert "INFEASIBLE" in page
    assert "Not measured: there is no pruned model." in page
    assert impossible.output is None
    assert len(impossible.files) == 1


def test_a_front_that_cannot_be_solved_costs_nobody_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SolverError("it ran out of time")

    monkeypatch.setattr(Programs, "solve_front", fail)
    report = report_of(*pruned())
    assert report.front is None
    assert "there is no Pareto front: it ran out of time" in html_page(report_page(report))


def test_the_environment_is_that_of_the_measurement() -> None:
    result, around = pruned()
    here, there = report_of(result, around), report_of(result, replace(around, elsewhere=True))
    assert here.environment["provider"] == "CPUExecutionProvider"
    assert there.environment == {"device": "ideal"}
    assert "the table was measured on ideal" in " ".join(here.notes)
    assert "all latencies were measured on ideal" in " ".join(there.notes)


def test_outputs_that_are_no_numbers_are_reported(tmp_path: Path) -> None:
    result, around = pruned()
    assert result.evidence is not None
    drift = {name: Drift(float("nan"), float("inf")) for name in result.evidence.drift}
    report = report_of(replace(result, evidence=replace(result.evidence, drift=drift)), around)
    (tmp_path / "report.json").write_text(report_json(report), encoding="utf-8")
    assert load_report(tmp_path / "report.json") == report
    assert report.proof is not None
    assert [(o.cosine, o.moved) for o in report.proof.outputs] == [(None, None)]


# Fidelity


def test_the_same_model_is_faithful() -> None:
    result, around = pruned()
    found = fidelity(around.original, result.structure, PruningPlan(keep={}), around.original, inputs())
    (output,) = found.outputs
    assert (output.cosine, output.error, output.agreement) == (pytest.approx(1.0), 0.0, 1.0)
    assert found.accuracy is not None
    assert found.accuracy[0] == found.accuracy[1]
    assert found.samples == 6


def test_accuracy_is_that_counted_by_hand() -> None:
    from zoo import run as run_model

    result, around = pruned()
    assert result.plan is not None
    assert result.model is not None
    data = inputs(20)
    rows = [
        [int(np.asarray(run_model(model, feed)[0]).argmax()) for feed in data.feeds]
        for model in (around.original, result.model)
    ]
    assert data.labels is not None
    right = [np.mean([a == int(b[0]) for a, b in zip(row, data.labels, strict=True)]) for row in rows]
    found = fidelity(around.original, result.structure, result.plan, result.model, data)
    assert found.accuracy == pytest.approx(tuple(right))
    assert found.outputs[0].agreement == pytest.approx(np.mean(np.equal(*rows)))


# The pages


def test_the_page_needs_no_network_and_no_script() -> None:
    html = html_page(report_page(reported()))
    for fragment in ("http:", "https:", "src=", "@import", "<script", "<link", "<iframe", "javascript:"):
        assert fragment not in html.replace("&lt;", ""), fragment
    assert set(re.findall(r"url\(.", html)) <= {"url(#"}
    seen = Seen(html)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in seen.attributes if name in ("href", "xlink:href"))
    policy = dict(seen.attributes)["content"], html
    assert "default-src 'none'" in html.partition("<style>")[0], policy
    assert "width=device-width" in html


def test_identifiers_are_unique_and_references_lead_somewhere() -> None:
    seen = Seen(html_page(report_page(reported())))
    identifiers = [value for name, value in seen.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    references = [value[1:] for name, value in seen.attributes if name == "href"]
    references += re.findall(r"url\(#([^)]*)\)", " ".join(value for _, value in seen.attributes))
    assert references
    assert set(references) <= set(identifiers)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_plain_text(name: str) -> None:
    page = Page(
        name,
        name,
        good=False,
        sentence=name,
        sections=(
            Section(name, (name, replace(report_page(reported()).sections[0].blocks[0], summary=name))),
        ),  # type: ignore[type-var]
        foot=name,
    )
    html, markdown = html_page(page), markdown_page(page)
    assert Seen(html).text.count(printable(name)) >= 6
    assert all(c.isprintable() for c in (html + markdown).replace("\n", ""))
    plain = html_page(replace(page, title="", word="", sentence="", foot="", sections=()))
    assert Seen(plain).tags.count("td") == 0
    assert "<script>alert" not in html + markdown


def test_rows_of_markdown_have_as_many_cells_as_their_head() -> None:
    cells = None
    for line in markdown_page(report_page(reported())).splitlines():
        if not line.startswith("| "):
            cells = None
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert cells in (None, found), line
        cells = found


@pytest.mark.parametrize(("filled", "outline"), [(0.0, 1.0), (0.5, 1.0), (2.0, 0.5), (-1.0, 0.0)])
def test_bars_stay_in_their_place(filled: float, outline: float) -> None:
    table = Table(
        report_page(reported()).sections[1].blocks[1].numbers.columns,
        (("x", "1", "1", Bar(filled, outline)),),
    )  # type: ignore[union-attr]
    html = html_page(Page("", "", True, "", (Section("", (table,)),), ""))
    widths = [float(width) for width in re.findall(r'width="([^"]*)" height="10"', html)]
    assert len(widths) == 2
    assert all(0 <= width <= 100 for width in widths)


# The command line


@pytest.fixture
def shop(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A folder with a model and labelled data, on a device that the table knows."""
    on_a_device(monkeypatch, Device(), bias())
    Path("model.onnx").write_bytes(text_model(NET).SerializeToString())
    data = inputs(8)
    assert data.labels is not None
    feeds = np.concatenate([feed["x"] for feed in data.feeds])
    np.savez("data.npz", x=feeds, labels=np.concatenate(data.labels))
    return run


REPORTS = {"slim.report.html", "slim.report.md", "slim.report.json"}
ARGUMENTS = ("model.onnx", "--report", "-o", "slim.onnx", "--data", "data.npz")


def written() -> set[str]:
    return {path.name for path in Path().iterdir() if path.name.startswith("slim")}


def test_prune_writes_the_report_beside_the_model(shop: Run) -> None:
    outcome = shop("prune", *ARGUMENTS, "--target-ratio", 0.5, "--json")
    assert outcome.code == 0, outcome
    assert written() == REPORTS | {
        f"slim.{end}" for end in ("onnx", "plan.json", "structure.svg", "recipe.yaml")
    }
    assert set(outcome.document["reports"]) == REPORTS
    report = load_report(Path("slim.report.json"))
    hashes = {file.name: file.sha256 for file in report.files}
    assert hashes.keys() == {"model.onnx", "slim.onnx", "slim.plan.json"}
    for name, found in hashes.items():
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest() == found
    assert report.fidelity is not None
    assert report.fidelity.accuracy is not None
    assert report.measured_ms == outcome.document["measured_ms"]
    again = shop("report", "slim.report.json", "-o", "other.html", "--json")
    assert again.document["output"] == "other.html"
    assert Path("other.html").read_bytes() == Path("slim.report.html").read_bytes()
    assert shop("report", "slim.report.json", "-o", "other.md").code == 0
    assert Path("other.md").read_bytes() == Path("slim.report.md").read_bytes()
    is_refused(shop("report", "slim.report.json", "-o", "other.pdf"), 2, "neither in .html nor in .md")
    is_refused(shop("report", "slim.report.json", "-o", "other.md"), 2, "other.md exists", "--overwrite")
    is_refused(shop("report", "slim.plan.json", "-o", "x.html"), 2, "no report of a prune")


def test_what_failed_is_reported_too_and_no_model_is_written(shop: Run) -> None:
    for target, code, word in ((1e-6, 4, "INFEASIBLE"), (1e6, 0, "NOTHING TO DO")):
        outcome = shop("prune", *ARGUMENTS, "--target-ms", target, "--overwrite")
        assert outcome.code == code
        assert "the report is slim.report.html" in outcome.err
        assert written() == REPORTS
        assert word in Path("slim.report.html").read_text(encoding="utf-8")


def test_a_missed_target_is_reported(shop: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch, Device(disturb=lambda _, ms: [ms[0], *(0.99 * ms[0] for _ in ms[1:])]))
    outcome = shop("prune", *ARGUMENTS, "--target-ratio", 0.5)
    assert outcome.code == 1
    assert written() == REPORTS
    html = Path("slim.report.html").read_text(encoding="utf-8")
    assert "MISSED" in html
    assert "No model was written." in html


@pytest.mark.parametrize("name", sorted(REPORTS))
def test_an_existing_report_is_refused_before_any_measurement(
    shop: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Path(name).write_text("mine", encoding="utf-8")
    monkeypatch.setattr(prune_commands, "prune", None)
    is_refused(shop("prune", *ARGUMENTS, "--target-ratio", 0.5), 2, name, "--overwrite")
    assert written() == {name}


def test_a_dry_run_and_a_run_without_the_option_write_no_report(shop: Run) -> None:
    assert shop("prune", *ARGUMENTS, "--target-ratio", 0.5, "--dry-run").code == 0
    assert written() == set()
    assert shop("prune", "model.onnx", "-o", "slim.onnx", "--target-ratio", 0.5).code == 0
    assert not written() & REPORTS
