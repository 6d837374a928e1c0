"""A chart of a run: bars for each case, or lines over a sweep."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attn_dispatch.bench.cases import short_number
from attn_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from attn_dispatch.bench.report import BenchReport
    from attn_dispatch.bench.runner import CaseResult

__all__ = ["check_format", "load_pyplot", "plot_report"]

#: Okabe and Ito's colours, which colour-blind readers can distinguish, and a mark each for lines.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "//", "\\\\", "..", "xx", "--", "++", "oo")

#: With more, the labels would be small.
_CASES_IN_A_ROW = 9

_TITLES = {
    "decode": "Decode: share of the read bandwidth measured in the same run",
    "prefill": "Prefill: share of the matmul throughput measured in the same run",
    "mixed": "Mixed: share of the larger of the two ceilings",
}


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing to files.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise InvalidInputError(
            f"--plot needs matplotlib, which cannot be imported here ({error}): "
            "pip install 'attn-dispatch[bench]'."
        ) from error
    matplotlib.use("Agg")
    module: ModuleType = pyplot
    return module


def check_format(path: Path) -> None:
    """Check, before the run, that a chart can have the format of the file's ending.

    Raises:
        InvalidInputError: matplotlib is not installed, or does not support the format.
    """
    load_pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending and ending not in known:
        raise InvalidInputError(
            f"{path}: a chart cannot have the format {ending!r}. Known are: {', '.join(known)}."
        )


def plot_report(report: BenchReport, path: Path, sweep: str | None = None) -> None:
    """Draw a report into a file.

    Args:
        report: with at least one case that was run.
        path: the file; its ending is the format.
        sweep: "context" or "batch" if the cases are those of a sweep: lines instead of bars.

    Raises:
        InvalidInputError: matplotlib is not installed, there is nothing to draw, or the file cannot
            be written.
    """
    pyplot = load_pyplot()
    results = [result for result in report.results if not result.skipped]
    if not results:
        raise InvalidInputError("There is nothing to plot: no case was run.")
    with pyplot.rc_context({"font.size": 15, "axes.titlesize": 17, "hatch.linewidth": 0.5}):
        figure = _lines(pyplot, report, results, sweep) if sweep else _bars(pyplot, report, results)
        title = f"{report.machine['device']}, torch {report.machine['torch']}"
        figure.suptitle(title, fontsize=19)
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{path} cannot be written: {error}.") from error
        finally:
            pyplot.close(figure)


def _bars(pyplot: Any, report: BenchReport, results: list[CaseResult]) -> Any:
    panels = [
        (kind, part)
        for kind in _TITLES
        for part in _in_rows([result for result in results if result.case.kind == kind])
    ]
    names = _timed_names(report)
    figure, axes = pyplot.subplots(
        len(panels), figsize=(17, 4.6 * len(panels) + 2), squeeze=False, constrained_layout=True
    )
    for axis, (kind, own) in zip(axes[:, 0], panels, strict=True):
        _draw_bars(axis, report, own, names)
        axis.set_title(_TITLES[kind], loc="left")
        axis.set_xlim(-0.6, max(len(part) for _, part in panels) - 0.4)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(names))))
    return figure


def _in_rows(results: list[CaseResult]) -> list[list[CaseResult]]:
    """The cases of one kind in as few rows as possible, of about the same length."""
    rows = max(1, -(-len(results) // _CASES_IN_A_ROW))
    length = max(1, -(-len(results) // rows))
    return [results[start : start + length] for start in range(0, len(results), length)]


def _draw_bars(axis: Any, report: BenchReport, own: list[CaseResult], names: list[str]) -> None:
    each = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * each
        shares = {
            place + offset: 100 * (result.share(row, report.ceilings) or 0.0)
            for place, result in enumerate(own)
            if (row := result.best(name)) is not None and row.timing is not None
        }
        axis.bar(
            list(shares),
            list(shares.values()),
            each,
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            hatch=_HATCHES[index // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
        )
    axis.axhline(100, color="black", linewidth=1.5, linestyle=":")
    axis.set_ylabel("% of ceiling")
    labels = [result.case.name.removeprefix(f"{result.case.kind}/") for result in own]
    axis.set_xticks(range(len(own)), labels, rotation=20, ha="right")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _lines(pyplot: Any, report: BenchReport, results: list[CaseResult], sweep: str) -> Any:
    figure, axis = pyplot.subplots(figsize=(12, 8), constrained_layout=True)

    def at(result: CaseResult) -> int:
        return result.case.seq_lens[0] if sweep == "context" else len(result.case.seq_lens)

    for index, name in enumerate(_timed_names(report)):
        points = {
            at(result): row.median_us
            for result in results
            if (row := result.best(name)) is not None and row.timing is not None
        }
        axis.plot(
            list(points),
            list(points.values()),
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKS[index % len(_MARKS)],
            linewidth=2.5,
            markersize=9,
        )
    floor = {at(r): r.case.bytes / report.ceilings.read_tb_s / 1e6 for r in results}
    axis.plot(
        list(floor),
        list(floor.values()),
        color="grey",
        linestyle=":",
        label="reading only the keys and values",
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(floor), [short_number(x) for x in floor])
    axis.minorticks_off()
    axis.set_xlabel("keys of the one request" if sweep == "context" else "requests of 4096 keys")
    axis.set_ylabel("time of one layer, µs")
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    return figure


def _timed_names(report: BenchReport) -> list[str]:
    timed = {row.name for result in report.results for row in result.rows if row.timing is not None}
    return [name for name in report.names if name in timed]
