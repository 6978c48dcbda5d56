"""The command `mgs`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import mgs_core as mgs
from mgs_core._errors import ArgumentError, MgsError, installing, renamed
from mgs_core._terminal import Display, console, plainly, table
from mgs_core.experiments.audit import BLOCK, usual_epochs
from mgs_core.experiments.compare import best_model, load_records, load_settings
from mgs_core.experiments.compare import compare as run_comparison
from mgs_core.experiments.data import load_digits_arrays, named_labels, read_arrays, require
from mgs_core.experiments.networks import logits_of
from mgs_core.experiments.recipes import DEFAULT, RECIPES, choose
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.surgery import before_softmax
from mgs_core.heads import Output

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Model Gradient Similarity: does a network learn, or memorise?"
)
_BackendOption = Annotated[str, typer.Option(help="numpy, torch, jax, tensorflow or keras; the default needs no framework.")]


@app.command()
@renamed(names="regularizers", folder="out")
def compare(
    data: Annotated[str, typer.Option(help="digits, mnist, or an .npz file with x_train, y_train, x_test, y_test.")] = "digits",
    noise: Annotated[float, typer.Option(help="Probability that a training label is redrawn.")] = 0.4,
    noise_kind: Annotated[str, typer.Option(help="symmetric or pair.")] = "symmetric",
    samples: Annotated[int | None, typer.Option(help="Training samples; all by default.")] = None,
    regularizers: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(RECIPES)}.")] = ",".join(DEFAULT),
    model: Annotated[str, typer.Option(help="mlp, cnn, or an .onnx file of a classifier, which is trained further.")] = "mlp",
    backend: _BackendOption = "numpy",
    epochs: Annotated[int, typer.Option(help="Passes over the training samples.")] = Settings.epochs,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = Settings.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Initial learning rate of Adam.")] = Settings.learning_rate,
    seeds: Annotated[int, typer.Option(help="Runs of each regulariser.")] = Settings.seeds,
    probe_samples: Annotated[int, typer.Option(help="Samples on which the kernel is measured.")] = Settings.probe_samples,
    tuning: Annotated[int, typer.Option(help="Strengths to try for each regulariser first, on noisy validation; 0 to 4.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes at a time; 0: one per core.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the records, the table and the page.")] = Path("mgs-run"),
) -> None:
    """Train one model on real data with wrong labels under each regulariser, and see which run memorises.

    A model of your own starts from the weights of its file, and takes the samples as the data file holds them.
    """
    settings = Settings(
        data=data, noise=noise, noise_kind=noise_kind, samples=samples, model=model, backend=backend, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate, seeds=seeds, probe_samples=probe_samples, tuning=tuning,
    )  # fmt: skip
    recipes = choose(name.strip() for name in regularizers.split(",") if name.strip())
    mgs.get_backend(backend)
    import mgs_core.report  # noqa: F401  # what the report needs must be there before the training, not after

    processes = jobs or (os.cpu_count() or 1)
    try:
        with Display([recipe.name for recipe in recipes], settings.epochs * settings.seeds) as on_record:
            run_comparison(settings, recipes, out, jobs=processes, on_record=on_record)
    except KeyboardInterrupt:
        console.print("\nInterrupted. Finished runs are kept; the same command goes on from here.")
        records = load_records(out / "records.jsonl")
        begun = {record["regularizer"] for record in records}
        if rest := [recipe.name for recipe in recipes if recipe.name not in begun]:
            console.print(f"Not begun: {', '.join(rest)}.", soft_wrap=True)
        if any(record["event"] in ("epoch", "run") for record in records):
            _show(out)
        raise typer.Exit(130) from None
    if _show(out):
        raise typer.Exit(1)


@app.command()
@renamed(folder="run")
def report(run: Annotated[Path, typer.Argument(help="Folder that `mgs compare` wrote.")]) -> None:
    """Write the table, the picture and the page of a comparison again."""
    _show(run)


@app.command()
@renamed(path="data", targets="y")
def measure(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    data: Annotated[
        Path,
        typer.Argument(help="An .npz file with x (n, …), or the inputs by name where there are several; for labels, y (n,)."),
    ],
    output: Annotated[str, typer.Option(help="Head: trace, sum, target, random or loss.")] = "trace",
    samples: Annotated[int, typer.Option(min=2, help="Number of samples to measure, from the first.")] = 256,
    backend: _BackendOption = "numpy",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Summarise the kernel of a model on data."""
    arrays = read_arrays(data, ())
    asarray = mgs.get_backend(backend).asarray
    loaded = mgs.onnx.load(model, backend=backend)
    if output == "loss":  # which takes scores, not their softmax
        proto, scores = before_softmax(loaded)
        loaded = mgs.onnx.load(proto, backend=backend, output=scores)
    names = [value.name for value in loaded.function.inputs]
    parts = names if len(names) > 1 else ["x"]
    labelled = "y" in arrays and "y" not in parts
    require(arrays, [*parts, "y"] if labelled else parts, data)
    if labelled and len(arrays["y"]) != len(arrays[parts[0]]):
        raise ArgumentError(
            f"`y` must hold a label for each of the {len(arrays[parts[0]])} samples of `{parts[0]}`; got {len(arrays['y'])}. "
            "Give both the same number of samples."
        )
    labels = arrays["y"][:samples] if labelled else None
    # other heads take labels of any kind, which only the summary reads
    heads = labels is not None and output in ("target", "loss")
    for name in (*parts, "y") if heads else parts:
        if arrays[name].dtype.kind not in "biuf":
            raise ArgumentError(
                f"`{name}` must hold real numbers; got dtype {arrays[name].dtype}. Convert it, labels to integers."
            )
    targets = asarray(labels) if heads else None
    batch = {name: asarray(arrays[name][:samples]) for name in parts}
    inputs = batch if len(names) > 1 else batch["x"]
    with renamed(inputs="x" if len(names) == 1 else "data"):
        loss = _cross_entropy(loaded, inputs, backend) if output == "loss" and targets is not None else None
        # kernel checks the name of the head
        kernel = mgs.kernel(loaded, inputs, targets, output=cast(Output, output), loss=loss)
    summary = mgs.summarize(kernel, None if labels is None else _classes(labels))
    if as_json:
        print(json.dumps(summary.to_dict()))
        return
    title = f"{model.name} on {len(kernel)} samples of {data.name}, output={output}"
    shown = table("summary", "value", title=title)
    for name, value in summary.to_dict().items():
        shown.add_row(name, f"{value:.6g}")
    console.print(shown)


def _cross_entropy(model: Any, inputs: Any, backend: str) -> Callable[[Any, Any], Any]:
    """Return the cross-entropy of a classifier's outputs: logits, probabilities of all classes, or the score of the second."""
    outputs = mgs.get_backend(backend).to_numpy(model(inputs))
    logits = logits_of(outputs) if outputs.ndim == 2 else lambda y: y
    return lambda y, labels: mgs.cross_entropy(logits(y), labels)


def _classes(labels: Any) -> Any:
    """Return labels that name classes, whole numbers as integers; None, and a warning, for what names none."""
    if labels.ndim == 1 and labels.dtype.kind == "f" and bool((labels == labels.round()).all()):
        return labels.astype(int)
    if labels.ndim == 1 and labels.dtype.kind not in "fc":
        return labels
    warnings.warn(
        f"`y` names no classes, by its dtype {labels.dtype} and shape {labels.shape}: figures by class are left out.",
        UserWarning,
        2,
    )
    return None


@app.command()
def check(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    samples: Annotated[int, typer.Option(min=2, help="Random samples to trace with.")] = 4,
    backend: _BackendOption = "numpy",
) -> None:
    """Say, for each parameter of a model, how it enters the kernel: statistics, rows or refused."""
    loaded = mgs.onnx.load(model, backend=backend)
    found = mgs.check(loaded, loaded.example_inputs(samples))
    shown = table("parameter", "kind", "route", "size", "remedy")
    for layer in found.layers:
        shown.add_row(escape(layer.parameter), layer.kind, layer.route, str(layer.size), escape(layer.remedy))
    console.print(shown)
    if loaded.uncounted:
        others = table("no parameter", "why")
        for name, why in loaded.uncounted.items():
            others.add_row(escape(name), escape(why))
        console.print(others)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
@renamed(path="data", folder="out")
def audit(
    data: Annotated[
        str,
        typer.Argument(help="An .npz file with x (n, …) and y (n,), or x_train and y_train, and perhaps names (c,); or digits."),
    ],
    model: Annotated[str, typer.Option(help="mlp, cnn, or an .onnx file of a classifier, which takes x as it is.")] = "mlp",
    backend: _BackendOption = "numpy",
    networks: Annotated[
        int, typer.Option(help="Networks that are trained, each on its share of the samples; their kernels are averaged.")
    ] = 2,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Judge a sample only by networks that were not trained on it; for samples of many columns."),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over all samples, for each network; 4 by default, more where samples are few. Longer training "
            "learns wrong labels."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Number of samples to audit, from the first; all by default.")
    ] = None,
    block: Annotated[
        int,
        typer.Option(
            min=3, help="Samples that are judged together; larger data are split at random into blocks of at most this size."
        ),
    ] = BLOCK,
    shown: Annotated[int, typer.Option(min=0, help="Samples in the gallery.")] = 200,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the page, the table and the weights.")] = Path("mgs-audit"),
) -> None:
    """Rank suspicious labels: which ones do the gradients of other samples contradict?

    DATA.npz is what numpy.savez("DATA.npz", x=x, y=y) writes; y has numbers from 0, which an array `names` may give names, or
    the names themselves. Each sample is judged by all others, or by those of its block.
    """
    pair, names = ("x", "y"), None
    if data == "digits":
        images, labels = load_digits_arrays()
    else:
        arrays = read_arrays(data, ())
        pair = ("x_train", "y_train") if "x_train" in arrays and "x" not in arrays else ("x", "y")
        require(arrays, pair, data)
        images, labels = (arrays[name] for name in pair)
        labels, names = named_labels(labels, arrays.get("names"), pair[1])
    images, labels = images[:samples], labels[:samples]
    mgs.get_backend(backend)
    from mgs_core.report import headline, write_audit  # needs Matplotlib and Jinja, which measuring a model does not
    from mgs_core.report.files import check_files
    from mgs_core.report.gallery import FILES

    check_files(out, FILES)  # before the training, not after
    with Progress(TextColumn("epoch"), BarColumn(), TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        epochs = usual_epochs(len(labels), model=model) if epochs is None else epochs
        task = bar.add_task("", total=networks * epochs)
        with renamed(inputs=pair[0], labels=pair[1]):
            found = mgs.audit(
                images, labels, model=model, backend=backend, networks=networks, apart=apart, epochs=epochs, block=block,
                seed=seed, on_epoch=lambda _: bar.advance(task),
            )  # fmt: skip
        bar.update(task, completed=networks * epochs)  # of fewer networks where samples are few
    called = [str(k) for k in range(int(max(found.given.max(), found.suggested.max())) + 1)]
    called[: len(names or ())] = names or ()  # a model of one's own may suggest classes beyond them
    page = write_audit(found, images, out, names=called, shown=shown)
    if found.blocks > 1:
        console.print(
            f"Judged in {found.blocks} random blocks, each sample by the others of its own: --block sets their size.",
            soft_wrap=True,
        )
    trust = f"The others predict {found.predictable:.0%} of the labels as given"
    console.print(f"{headline(found)}. {trust}. The most suspicious:", soft_wrap=True)
    listed = table("sample", "given", "suggested", "score")
    for a in found.order[:10]:
        given, suggested = (escape(called[label]) for label in (found.given[a], found.suggested[a]))
        listed.add_row(str(a), given, suggested, f"{found.scores[a]:+.2f}")
    console.print(listed)
    console.print(
        f"Page: {page}\nTable: {page.with_name('suspects.csv')}\nWeights: {page.with_name('weights.npy')}", soft_wrap=True
    )


@app.command()
def backends() -> None:
    """List the backends and whether each is installed."""
    shown = table("backend", "installed", "install with")
    for name, installed in mgs.available_backends().items():
        shown.add_row(name, "yes" if installed else "no", "" if installed else escape(installing(name)))
    console.print(shown)


def main() -> None:
    """Run the command; errors of this library end it with one line and status 2, and warnings are one line too."""
    plainly()
    try:
        app()
    except MgsError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _show(folder: Path) -> bool:
    """Print the table and write the files; return whether runs failed."""
    with renamed(path="folder"):
        records = load_records(folder / "records.jsonl")
    if not records:
        raise ArgumentError(f"`folder` must be a folder with records; {str(folder)!r} holds none. Run mgs compare first.")
    settings = load_settings(folder)
    from mgs_core import report as pages  # as in `audit`
    from mgs_core.report.runs import read
    from mgs_core.report.words import failures

    rows = pages.table(records)
    page = pages.write_report(records, settings, folder)
    title = f"{settings['data']}, {settings['noise']:.0%} of the labels redrawn"
    shown = table(*rows[0], title=title, padding=0, pad_edge=False, show_edge=False)
    for column in shown.columns:  # as wide as its cells and the longest word of its title, which fits 80 columns
        name = str(column.header)
        column.width = max(len(text) for text in (*name.split(), *(row[name] for row in rows)))
        column.justify = "left" if name == "regulariser" else "right"
    for row in rows:
        shown.add_row(*map(escape, row.values()))
    console.print(shown)
    console.print(f"Page: {page}\nPicture: {page.with_name('figure.png')}\nRecords: {folder / 'records.jsonl'}", soft_wrap=True)
    best = best_model(records, folder)
    if best is not None:
        console.print(f"Model of the best test accuracy, trained: {best}", soft_wrap=True)
    failed = failures(read(records))
    for sentence in failed:
        console.print(f"[bold red]{escape(sentence)}[/]", soft_wrap=True)
    if failed:
        console.print("The command that made the comparison tries failed runs again.", soft_wrap=True)
    return bool(failed)
