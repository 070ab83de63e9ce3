"""`kvx plan`: what a model, a policy and a chip come to, before any weight is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from kvx.cli.policy_argument import HELP, policy_argument


def plan(
    model: Annotated[
        str, typer.Argument(help="A zoo name, a Hugging Face directory, a .gguf file, or a config.json of any name.")
    ],
    chip: Annotated[str, typer.Option(help="v4, v5e, v5p, v6e, H100, H200 or MI300X.")] = "v5e",
    chips: Annotated[int, typer.Option(help="Chips that hold the model together.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens of every prompt. Default: 32768, or what the model has positions for.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help=HELP + " May be repeated; the full cache is always there."),
    ] = None,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="Answers that a user gets about one prompt.")] = 1,
    users: Annotated[int | None, typer.Option(help="Users who share the machine; default: as many as prompts.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, of weights, keys and values.")] = "bfloat16",
    formulas: Annotated[bool, typer.Option("--formulas", help="Also say how each figure comes about.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Also compile for the TPU and compare: minutes; needs libtpu.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A .png of the largest batch against the prompt's length, by policy.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every formula.")] = False,
) -> None:
    """Plan: bytes, largest batch and context, times of prefill, step and context switch, sessions an hour.

    No weights are needed. The cache is built as shapes by the code that builds real ones, so its bytes are exact; times
    are those of a chip at its peak. On a TPU, bytes on a chip include the padding of its tiles.

    Examples:

        kvx plan configs/models/llama-3.1-8b.json --chip v5p --batch 8 --policy "snapkv(budget=0.25)+kivi(bits=2)"

        kvx plan configs/models/llama-3.1-8b.json --chip H100 --context 100000 --users 20 --rounds 5 --formulas

        kvx plan smollm2-135m-instruct --context 2048 --batch 8 -p "kivi(bits=2)" --check

        kvx plan smollm2-135m-instruct -p "snapkv(budget=1024)" -p "quest(budget=1024)" --json
    """
    from json import dumps

    from rich.console import Console

    from kvx.eval.plan import tables
    from kvx.eval.plan.check import check as compile_and_compare
    from kvx.eval.plan.check import topology_of
    from kvx.eval.plan.chips import find_chip
    from kvx.eval.plan.planning import Job, Planner
    from kvx.eval.plan.plot import batches_png, checked_png
    from kvx.eval.plan.roofline import Machine
    from kvx.generate import full_policy
    from kvx.progress import Steps

    job = Job(model, Machine(find_chip(chip), chips), context, batch, answer, rounds, users, dtype)
    if check:
        topology_of(job.machine.chip, chips)
    chosen = [policy_argument(text) for text in policy or ()]
    chosen = [full_policy(), *(each for each in chosen if each.stages)]
    target = None if out is None else checked_png(out)
    planner = Planner(job)
    plans, checks = [], []
    with Steps(len(chosen) * (2 if check else 1), None) as step:
        for each in planner.plans(chosen):
            step(f"plan: {each.policy}")
            plans.append(each)
        for each in chosen if check else ():
            step(f"compile: {each.text}")
            checks.append(compile_and_compare(planner, each))
    if target is not None:
        target.write_bytes(batches_png(planner, chosen))
    if json:
        print(dumps(tables.as_json(planner.job, plans, checks), indent=2))
        return
    shown = [tables.plan_table(planner.job, plans)]
    shown += [tables.check_table(checks)] if checks else []
    shown += [tables.formula_table(planner.job)] if formulas else []
    for table in shown:
        Console().print(table)
