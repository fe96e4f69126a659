"""`vipbench symptoms improve` and `merge`: a better set out of one by an LLM and training images, or out of several sets."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vipbench.harness.commands.generate import Source, check_record, check_source, open_client
from vipbench.harness.commands.options import (
    ApiKey,
    ApiKeyFile,
    BackboneName,
    BatchSize,
    Cache,
    Device,
    Gpus,
    MaxTokens,
    Model,
    Out,
    Overwrite,
    Presets,
    Pretrained,
    Serve,
    Synonyms,
    Temperature,
    TensorParallel,
    TopP,
    Url,
    Workers,
    check_output,
    load,
)
from vipbench.harness.commands.outcome import finish
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.keys import read_key

if TYPE_CHECKING:
    from vipbench.harness.symptoms.sets import SymptomSet

ASK_FOR_BACKBONE = "--backbone: name the model whose images and texts are compared"


class By(StrEnum):
    """Ways to merge sets."""

    vote = "vote"
    worth = "worth"


def improve(
    file: Annotated[Path, typer.Argument(metavar="SET", help="a symptom set, a JSON file")],
    data: Annotated[
        str,
        typer.Option(help="a prepared dataset (folder or URL); its training and validation images are used, no others"),
    ],
    out: Out,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    modality: Annotated[str | None, typer.Option(help="default: the set's, or the dataset's")] = None,
    url: Url = None,
    serve: Serve = None,
    offline: Annotated[bool, typer.Option("--offline", help="or ask nobody: the same again from the record")] = False,
    model: Model = None,
    revision: Annotated[str | None, typer.Option(help="its revision, where the server does not report it")] = None,
    server_version: Annotated[str | None, typer.Option(help="where the server does not report it")] = None,
    cache: Cache = Path("responses.sqlite"),
    rounds: Annotated[int, typer.Option(min=1, help="the most rounds of questions")] = 5,
    pairs: Annotated[int, typer.Option(min=1, help="the most confused pairs of classes that a round asks about")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="answers to each question")] = 4,
    count: Annotated[int, typer.Option(min=1, max=50, help="the most symptoms of a class")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify", help="ask for each phrase: can it be seen, is it truer of its class? yes or no")
    ] = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = 512,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    synonyms: Synonyms = None,
    templates: Annotated[Path | None, typer.Option(help="a folder with templates in place of ours")] = None,
    presets: Presets = None,
    keep_jargon: Annotated[bool, typer.Option("--keep-jargon", help="keep medical terms")] = False,
    api_key_file: ApiKeyFile = None,
    api_key: ApiKey = None,
    concurrency: Annotated[int, typer.Option(min=1, help="requests in flight at each server")] = 256,
    gpus: Gpus = None,
    tensor_parallel: TensorParallel = 1,
    overwrite: Overwrite = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Ask an LLM, round by round, for what tells the most confused classes apart, and keep what helps on held-out images."""
    from vipbench.harness.data.reader import Dataset
    from vipbench.harness.symptoms import plans
    from vipbench.harness.symptoms.improve import improve as improve_set
    from vipbench.harness.symptoms.llm.cache import ResponseCache
    from vipbench.harness.symptoms.measure import check_splits, measure
    from vipbench.harness.symptoms.sets import SymptomSet
    from vipbench.harness.symptoms.verify import Verifier

    source = Source(
        urls=url or [],
        serve=serve,
        model=model,
        revision=revision,
        server_version=server_version,
        cache=cache,
        api_key=read_key(api_key_file),
        concurrency=concurrency,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
    )
    if backbone is None:
        raise UserError(ASK_FOR_BACKBONE)
    check_source(source, offline)
    check_output(out, overwrite)
    start, dataset = SymptomSet.load(file), Dataset(data)
    start.texts(dataset.classes)  # before the work begins: every class has its symptoms
    check_splits(dataset)
    check_record(source)
    pairs_of = [(name, "") for name in dataset.classes]
    loaded = load(backbone, pretrained, device)
    plan = plans.make_plan(
        plans.Classes(start.task, modality or start.modality or dataset.info.modality, pairs_of),
        kind="symptoms",
        sampling={"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed},
        samples=samples,
        count=count,
        rounds=rounds,
        verify=verify,
        synonyms=synonyms,
        templates=templates,
        presets=presets,
        keep_jargon=keep_jargon,
        backbone=(backbone, pretrained, loaded),
    )
    measured = measure(dataset, loaded, batch_size=batch_size, workers=workers)
    with ResponseCache(cache) as record, open_client(source, record) as client:
        verification = plan.verification(Verifier(client.complete, lambda: client.identity))
        improved = improve_set(
            plan,
            start,
            measured,
            client.identity,
            client.complete,
            pairs=pairs,
            verify=verification.beliefs if verification else None,
            note=client.stats.note,
            answered_by=lambda: client.identity,
        )
        if verification:
            update = {"verification": verification.describe()}
            improved = improved.model_copy(update={"provenance": improved.provenance.model_copy(update=update)})
    _show(improved)
    finish(improved, out)
    typer.echo(f"what changed: vipbench symptoms diff {file} {out}")


def _show(improved: "SymptomSet") -> None:
    """Print a line for each round."""
    details = improved.provenance.model_dump()
    for entry in details["rounds"]:
        figures = [f"training accuracy {entry['train_accuracy']:.3f}"]
        if "validation_accuracy" in entry:
            figures.append(f"validation accuracy {entry['validation_accuracy']:.3f}")
        if entry["round"]:
            figures.append(f"{len(entry['added'])} symptoms added, {len(entry['dropped'])} dropped")
        what = f"round {entry['round']}" if entry["round"] else "before"
        typer.echo(f"{what}: {', '.join(figures)}")
    typer.echo(f"the result is the set of round {details['result_of_round']}")


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A B ...", help="symptom sets of the same classes")],
    out: Out,
    by: Annotated[
        By, typer.Option(help="what counts: how many sets hold a symptom, or how well it separates training images")
    ] = By.vote,
    count: Annotated[int | None, typer.Option(min=1, help="the most symptoms of a class; default: as the sets")] = None,
    data: Annotated[
        str | None, typer.Option(help="for --by worth: a prepared dataset; only its training split is used")
    ] = None,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    overwrite: Overwrite = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Make one set of several, those of different LLMs for example. Near-same wordings count as one symptom."""
    from vipbench.harness.data.reader import Dataset
    from vipbench.harness.symptoms import merge as merging
    from vipbench.harness.symptoms.score import score_set
    from vipbench.harness.symptoms.sets import SymptomSet

    check_output(out, overwrite)
    sets = [SymptomSet.load(file) for file in files]
    merging.check_mergeable(sets, [str(file) for file in files])
    if by is By.vote:
        if data or backbone:
            raise UserError("--data and --backbone are for --by worth")
        merged = merging.by_vote(sets, count)
    else:
        if data is None:
            raise UserError("--by worth: give the --data whose training images decide")
        if backbone is None:
            raise UserError(ASK_FOR_BACKBONE)
        dataset, united = Dataset(data), merging.unite(sets)
        united.texts(dataset.classes)
        loaded = load(backbone, pretrained, device)
        scores = score_set(united, dataset, loaded, batch_size=batch_size, workers=workers)
        merged = merging.by_worth(sets, scores, count)
    alone = merged.provenance.model_dump()["merged"].get("without_a_vote", [])
    if alone:
        typer.echo(f"no symptom is in several sets, so each set's first is kept: {', '.join(alone)}")
    finish(merged, out)
