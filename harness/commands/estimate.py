"""`vipbench symptoms generate --dry-run`: what an LLM would be asked, and what it costs."""

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vipbench.harness.symptoms.generate import Plan

CHARACTERS_PER_TOKEN = 4  # of English, about


def print_estimate(plan: "Plan", tokens_per_second: float) -> None:
    """Print requests, tokens and time of the first round, and one request in full."""
    from vipbench.harness.symptoms.generate import Group

    questions = answers = prompt = 0
    example = None
    for names in plan.groups:
        group = Group(names)
        for name in names:
            for step in plan.knowledge.steps:
                features = [] if step is plan.knowledge.steps[0] else ["x" * 80] * plan.most_items
                question = plan.question(group, name, step, 0, features, "MODEL")
                example = example or question
                questions += plan.samples
                prompt += plan.samples * sum(len(message["content"]) for message in question.messages)
                answers += plan.samples * plan.most_items * (80 if step is plan.knowledge.steps[0] else 30)
    prompt, answers = prompt // CHARACTERS_PER_TOKEN, answers // CHARACTERS_PER_TOKEN
    seconds = answers / tokens_per_second
    typer.echo(f"{len(plan.classes)} classes, {plan.samples} samples, {len(plan.knowledge.steps)} steps")
    typer.echo(f"first round: {questions:,} requests, at most {plan.rounds} rounds ({questions * plan.rounds:,})")
    typer.echo(f"about {prompt:,} prompt tokens (most of them shared by a group) and {answers:,} answer tokens a round")
    typer.echo(f"about {_duration(seconds)} a round at {tokens_per_second:g} answer tokens/s (--tokens-per-second)")
    if example:
        typer.echo("the first request:")
        for message in example.messages:
            typer.echo(f"[{message['role']}]\n{message['content']}")
        typer.echo(f"[schema]\n{json.dumps(example.schema)}")


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
