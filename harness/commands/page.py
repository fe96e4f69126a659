"""The verbs `vipbench report DIR...` and `vipbench bundle DIR`: results to look at, and to pass on."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="sweeps' --out, directories of run directories, bundles (.zip)"),
    ],
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="of the page")] = "Runs of vipbench",
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="thumbnails of test images; not where data must not leave")
    ] = True,
    image_mb: Annotated[float, typer.Option(min=0, help="megabytes of all thumbnails together, at most")] = 2.0,
    cards: Annotated[int, typer.Option(min=0, help="diagnosis cards, at most; 0: the model is not loaded")] = 12,
    scores: Annotated[
        list[Path] | None, typer.Option(help="what `vipbench symptoms score --json` wrote; repeatable")
    ] = None,
) -> None:
    """Write runs as one HTML file that opens without a network: tables, runs, samples, symptoms."""
    from vipbench.harness.report.page.build import Options, build_page
    from vipbench.harness.system.files import disk_errors, write_text

    options = Options(images, int(image_mb * 1e6), cards, scores or [], title)
    page = build_page(places, options)
    with disk_errors(out):
        write_text(out, page)
    typer.echo(f"page: {out} ({len(page.encode()) / 1e6:.1f} MB)")


def bundle(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a sweep's --out, or a directory of run directories")
    ],
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("results.zip"),
) -> None:
    """Write finished runs as a zip file for others to check: no images, no paths, no names of machines."""
    from vipbench.harness.report.bundle import write_bundle

    count = write_bundle(directory, out)
    typer.echo(f"bundle: {out} ({count} run{'' if count == 1 else 's'}, {out.stat().st_size / 1e6:.1f} MB)")
