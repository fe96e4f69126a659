"""`vipbench symptoms generate`: options become a plan, a plan becomes a set, an estimate or a batch file."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.estimate import print_estimate
from vipbench.harness.commands.options import (
    ApiKey,
    ApiKeyFile,
    BackboneName,
    Cache,
    Gpus,
    MaxTokens,
    Model,
    Overwrite,
    Presets,
    Pretrained,
    Serve,
    Synonyms,
    Temperature,
    TensorParallel,
    TopP,
    Url,
    check_output,
    load,
)
from vipbench.harness.commands.outcome import finish
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.keys import read_key
from vipbench.harness.system.files import output_errors

if TYPE_CHECKING:
    from vipbench.harness.symptoms.generate import Plan
    from vipbench.harness.symptoms.llm.cache import ResponseCache
    from vipbench.harness.symptoms.llm.client import Client
    from vipbench.harness.symptoms.llm.record import Identity

MODEL_NAME = "MODEL"  # in place of the name of a model before the server has answered
BATCH = "batch"  # in place of the version of a server that answers a batch file, unless it is given
SLURM = "--executor slurm"
OWN_SERVER_PATIENCE = 30.0  # seconds: a server that was started for the job does not come back


class Place(StrEnum):
    """Places where generation can run."""

    local = "local"
    slurm = "slurm"


class Kind(StrEnum):
    """Kinds of knowledge about classes, as the ViP paper compares them (Figure 5)."""

    symptoms = "symptoms"
    description = "description"
    definition = "definition"
    class_name = "class-name"
    random_words = "random-words"


@dataclass(frozen=True)
class Source:
    """The origin of answers: servers, one to be started, or the record alone (none of them). `verifier`: another LLM's."""

    urls: list[str]
    serve: str | None
    model: str | None
    revision: str | None
    server_version: str | None
    cache: Path
    api_key: str | None = field(repr=False)
    concurrency: int
    gpus: int | None
    tensor_parallel: int
    verifier: "Source | None" = None


def generate(
    context: typer.Context,
    task: Annotated[str | None, typer.Option(help="the task's name; default: the dataset's")] = None,
    classes: Annotated[str | None, typer.Option(help="A,B,C")] = None,
    classes_file: Annotated[Path | None, typer.Option(help="a class per line; a tab and its group may follow")] = None,
    data: Annotated[
        str | None, typer.Option(help="or a prepared dataset (folder or URL), for its classes and modality")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="dermoscopy, chest X-ray, histopathology, fundus, ...")] = None,
    knowledge: Annotated[Kind, typer.Option(help="the kind of knowledge to ask for")] = Kind.symptoms,
    url: Url = None,
    serve: Serve = None,
    offline: Annotated[bool, typer.Option("--offline", help="or ask nobody: rebuild the set from the record")] = False,
    model: Model = None,
    revision: Annotated[
        str | None,
        typer.Option(help="the model's revision, where the server does not report it; with --serve: the one to serve"),
    ] = None,
    server_version: Annotated[
        str | None,
        typer.Option(help="where the server does not report it, or for a batch file; offline: of the answers to use"),
    ] = None,
    cache: Cache = Path("responses.sqlite"),
    samples: Annotated[int, typer.Option(min=1, help="answers per class and round")] = 4,
    count: Annotated[int, typer.Option(min=1, max=50, help="symptoms wanted for each class")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="the most rounds of questions, where too few are left")] = 3,
    consensus: Annotated[
        int | None,
        typer.Option(min=1, help="of the samples must contain a symptom; default: a third (other knowledge: 1)"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="ask for each symptom: can it be seen, is it truer of its class? yes or no")
    ] = False,
    verify_url: Annotated[list[str] | None, typer.Option(help="or have another LLM verify, on these servers")] = None,
    verify_model: Annotated[
        str | None, typer.Option(help="its name there, or on --url; offline: of its answers")
    ] = None,
    verify_key_file: Annotated[Path | None, typer.Option(help="a file with the API key of --verify-url")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = 512,
    presence_penalty: Annotated[
        float | None, typer.Option(help="of the sampling, against loops; default: the templates'")
    ] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="the same, growing with each repetition")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0, help="the same, but of the question's words too (vLLM's own); 1 is none")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the sampling, and of random words")] = 0,
    synonyms: Synonyms = None,
    templates: Annotated[
        Path | None, typer.Option(help="a folder with templates or worked examples in place of ours")
    ] = None,
    templates_version: Annotated[
        int, typer.Option(min=1, max=2, help="of our templates; 1 has no worked examples")
    ] = 2,
    steps: Annotated[
        int,
        typer.Option(min=1, max=2, help="1 asks for symptoms at once, as suits small models; 2: for features first"),
    ] = 2,
    presets: Presets = None,
    keep_jargon: Annotated[bool, typer.Option("--keep-jargon", help="count medical terms, but keep them")] = False,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    name: Annotated[str | None, typer.Option(help="the set's name; default: the model's, or the knowledge's")] = None,
    out: Annotated[Path, typer.Option(help="the set becomes OUT/TASK/NAME.json")] = Path("symptoms_cache"),
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the first request and the cost")] = False,
    tokens_per_second: Annotated[float, typer.Option(min=1, help="of all servers, for --dry-run")] = 2000.0,
    batch_file: Annotated[
        Path | None, typer.Option(help="write the requests that can be made now, for `vllm run-batch`")
    ] = None,
    from_batch: Annotated[Path | None, typer.Option(help="record the answers of `vllm run-batch` first")] = None,
    api_key_file: ApiKeyFile = None,
    api_key: ApiKey = None,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="requests in flight at each server; fewer where it often refuses (429) or times out"),
    ] = 256,
    gpus: Gpus = None,
    tensor_parallel: TensorParallel = 1,
    executor: Annotated[
        Place, typer.Option(help="here, or as a Slurm job, in which --serve starts vLLM")
    ] = Place.local,
    profile: Annotated[Path | None, typer.Option(help="settings of the job in YAML", rich_help_panel=SLURM)] = None,
    partition: Annotated[str | None, typer.Option(help="as of sbatch", rich_help_panel=SLURM)] = None,
    time: Annotated[
        str | None, typer.Option(help="before the job is requeued, as of sbatch", rich_help_panel=SLURM)
    ] = None,
) -> None:
    """Let an LLM write a symptom set: elicit, refine, filter. Recorded answers are never asked for again."""
    from vipbench.harness.symptoms import plans
    from vipbench.harness.symptoms.generate import without_llm

    if executor is not Place.slurm and (profile or partition or time):
        raise UserError("--profile, --partition and --time are for --executor slurm")
    classes_given = plans.read_classes(task, classes, classes_file, data, modality)
    plan = plans.make_plan(
        classes_given,
        kind=knowledge.value,
        sampling={
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
            **plans.penalties(templates_version, presence_penalty, frequency_penalty, repetition_penalty),
        },
        samples=samples,
        count=count,
        rounds=rounds,
        consensus=consensus,
        verify=verify or bool(verify_url or verify_model),
        synonyms=synonyms,
        templates=templates,
        version=templates_version,
        one_step=steps == 1,
        presets=presets,
        keep_jargon=keep_jargon,
        backbone=None if backbone is None else (backbone, pretrained, load(backbone, pretrained)),
    )
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
    if verify_url or verify_model:
        source = replace(source, verifier=_verifying(source, verify_url or [], verify_model, verify_key_file))
    if dry_run:
        print_estimate(plan, tokens_per_second)
    elif batch_file or from_batch:
        _batch(plan, source, batch_file, from_batch)
    elif not plan.knowledge.steps:
        file = _file(out, plan.task, name or plan.kind)
        check_output(file, overwrite)
        finish(without_llm(plan, seed), file)
    else:
        check_source(source, offline)
        check_output(_file(out, plan.task, name or MODEL_NAME), overwrite or not name)  # before the work begins
        if executor is Place.slurm:
            _submit(context, source, profile, {"partition": partition, "time": time, "gpus_per_run": gpus})
            return
        _generate(plan, source, out, name, overwrite)


def _submit(context: typer.Context, source: Source, profile: Path | None, options: dict[str, Any]) -> None:
    """Submit the same command as a Slurm job. When requeued it goes on from the recorded answers."""
    from vipbench.sweeps.submit import submit_command

    if source.serve is None:
        raise UserError(
            "--serve: say which model the job is to serve; without one there is nothing to wait for a GPU for"
        )
    if source.tensor_parallel > 1 and source.gpus is None and profile is None:
        raise UserError("--gpus: give the number of GPUs that the job gets, a multiple of --tensor-parallel")
    command = [sys.executable, "-m", "vipbench", "symptoms", "generate", *_given_options(context)]
    jobs = source.cache.with_suffix(".jobs")
    log_file = jobs / f"{datetime.now():%Y%m%d-%H%M%S}.log"
    check_output(log_file)
    number = submit_command(command, jobs, log_file, profile, options)
    typer.echo(
        f"job {number} is in the queue and will write the set; what it says: {log_file}; scancel {number} ends it"
    )


def _given_options(context: typer.Context) -> list[str]:
    """Repeat the options of this command as they were given, without those of the job."""
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE" and name not in ("executor", "profile", "partition", "time", "gpus"):
            value = context.params[name]
            values = value if isinstance(value, list) else [value]
            for item in values:
                words += [parameter.opts[0]] if item is True else [parameter.opts[0], str(item)]
    return words


def _verifying(source: Source, urls: list[str], model: str | None, key_file: Path | None) -> Source:
    """Make the source of another LLM's answers. A key for `--url` is not sent elsewhere."""
    if source.serve and not urls:
        raise UserError("--verify-model: --serve serves one model; say with --verify-url where the other one is served")
    same = not urls
    return replace(
        source,
        urls=source.urls if same else urls,
        serve=None,
        model=model,
        revision=None,
        server_version=None,
        api_key=read_key(key_file) if key_file else (source.api_key if same else None),
    )


def check_source(source: Source, offline: bool) -> None:
    if sum([bool(source.urls), source.serve is not None, offline]) != 1:
        raise UserError("say who answers: --url URL (or several), --serve MODEL, or --offline for the record alone")


def check_record(source: Source) -> None:
    """Raise UserError where nobody is asked and there is no record either."""
    if not (source.urls or source.serve) and not source.cache.exists():
        raise UserError(f"{source.cache}: no such response cache; `vipbench symptoms cache import` makes one")


def _generate(plan: "Plan", source: Source, out: Path, name: str | None, overwrite: bool) -> None:
    from vipbench.harness.symptoms.generate import generate
    from vipbench.harness.symptoms.llm.cache import ResponseCache
    from vipbench.harness.symptoms.verify import Verifier

    check_record(source)
    with ExitStack() as stack:
        cache = stack.enter_context(ResponseCache(source.cache))
        client = stack.enter_context(open_client(source, cache))
        file = _file(out, plan.task, name or client.identity.model.rsplit("/", 1)[-1])
        check_output(file, overwrite)
        verifier = None
        if source.verifier:
            other = stack.enter_context(open_client(source.verifier, cache))
            verifier = Verifier(other.complete, lambda: other.identity)
        symptoms = generate(
            plan, client.identity, client.complete, client.stats.note, lambda: client.identity, verifier
        )
        typer.echo(f"{client.identity.model}: {client.stats.note()}", err=True)
    finish(symptoms, file)


@contextmanager
def open_client(source: Source, cache: "ResponseCache") -> "Iterator[Client]":
    from vipbench.harness.symptoms.llm.client import Client
    from vipbench.harness.symptoms.llm.server import Server

    if source.serve is None:
        yield Client(
            source.urls,
            source.model,
            cache,
            api_key=source.api_key,
            concurrency=source.concurrency,
            revision=source.revision,
            server_version=source.server_version,
        )
        return
    server_to_start = Server(
        source.serve,
        gpus=source.gpus,
        tensor_parallel=source.tensor_parallel,
        revision=source.revision,
        api_key=source.api_key,
    )
    with server_to_start as server:
        yield Client(
            [server.url],
            server.name,
            cache,
            api_key=server.api_key,
            concurrency=source.concurrency,
            patience=OWN_SERVER_PATIENCE,
        )


def _batch(plan: "Plan", source: Source, batch_file: Path | None, from_batch: Path | None) -> None:
    """Record a batch's answers, and write the requests that can be made next."""
    from vipbench.harness.symptoms.generate import pending
    from vipbench.harness.symptoms.llm.batch import read_batch, write_batch
    from vipbench.harness.symptoms.llm.cache import ResponseCache
    from vipbench.harness.symptoms.llm.record import Identity

    if source.model is None:
        raise UserError("--model: say which model answers the batch file (as `vllm run-batch --model` names it)")
    if source.verifier:
        raise UserError("--verify-url, --verify-model: a batch file is for one model; give --verify alone")
    if batch_file:
        check_output(batch_file)
    identity = Identity(source.model, source.revision or "unknown", source.server_version or BATCH)
    with ResponseCache(source.cache) as cache:
        if from_batch:
            result = read_batch(from_batch, pending(plan, identity, cache), cache, identity)
            typer.echo(f"{from_batch}: {result.recorded} answers recorded, {result.failed} failed")
        with output_errors(batch_file or source.cache):
            left = write_batch(batch_file, pending(plan, identity, cache)) if batch_file else None
        if batch_file and left:
            typer.echo(f"{batch_file}: {left} requests; answer them and give the same command --from-batch ANSWERS")
        if left == 0 or (left is None and next(pending(plan, identity, cache), None) is None):
            typer.echo(f"all answers are on record; write the set with --offline {_identity_options(identity)}")


def _identity_options(identity: "Identity") -> str:
    model, revision, version = map(shlex.quote, identity)
    return f"--model {model} --revision {revision} --server-version {version}"


def _file(out: Path, task: str, name: str) -> Path:
    for part in (task, name):
        if not part or part in (".", "..") or "/" in part or "\0" in part:
            raise UserError(
                f"{part!r} cannot be part of the set's file name OUT/TASK/NAME.json; choose --task and --name"
            )
    return out / task / f"{name}.json"
