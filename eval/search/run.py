"""Running a search: its folder, its records, and what it leaves there."""

from pathlib import Path
from typing import Any

from rich.console import Console

from kvx.decoder import Decoder
from kvx.destinations import replace_file
from kvx.errors import BadInput
from kvx.eval.loading import load_over_devices
from kvx.eval.records import RECORDS, Record, append, mend, read
from kvx.eval.results_folder import claim
from kvx.eval.search.benches import bench_of
from kvx.eval.search.findings import as_config, as_json, rows_of
from kvx.eval.search.job import SearchJob
from kvx.eval.search.loop import Found, search
from kvx.eval.search.picture import frontier_png
from kvx.eval.search.progress import Watch
from kvx.eval.search.space import Space
from kvx.eval.summary import Row
from kvx.models.zoo import resolve
from kvx.prose import prose

JSON, CONFIG, PICTURE = "search.json", "frontier.toml", "frontier.png"


def run_search(
    job: SearchJob, *, console: Console | None = None, loaded: tuple[Decoder, Any] | None = None
) -> tuple[Found, dict[str, Row]]:
    """Look for the frontier below a limit, and write it to the job's folder.

    Args:
        job: what is looked for.
        console: where progress goes; None: standard error.
        loaded: the model and its tokenizer; None: they are loaded.

    Returns:
        What was found, and the summary of the policies that were run on all samples, by their texts. The folder then
        holds records.jsonl, search.json, frontier.toml for `kvx eval`, and frontier.png.

    Raises:
        BadInput: a name, a task or a folder that cannot be; a limit that nothing fits in.
    """
    space, text = Space.of(job.only, job.without), prose(None if job.text is None else Path(job.text))
    if loaded is None:
        resolve(job.model)
    folder = claim(job.evaluation(), text)
    mend(folder / RECORDS)
    records = read(folder / RECORDS, Record)
    decoder, tokenizer = loaded or load_over_devices(job.model, job.dtype)
    bench = bench_of(job, decoder, tokenizer, text, records)
    with Watch(job.trials, console) as watch:
        found = search(
            space, bench, job.max_bytes_per_token, job.trials,
            seed=job.seed, records=records, save=lambda new: append(folder / RECORDS, new), tell=watch,
        )  # fmt: skip
    rows = rows_of(found, read(folder / RECORDS, Record))
    title = f"{job.model}: {job.task}, {job.length} tokens, {found.counts[-1]} samples"
    quality = "negative KL from the full cache, nats" if job.on_documents else f"score, question {job.mode}"
    try:
        replace_file(folder / JSON, as_json(job, found, rows).encode())
        replace_file(folder / CONFIG, as_config(job, found).encode())
        replace_file(folder / PICTURE, frontier_png(found, title, quality))
    except OSError as error:
        raise BadInput(f"output={str(folder)!r} cannot be written: {error.strerror or error}") from None
    return found, rows
