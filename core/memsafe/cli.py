"""The command line: embed a corpus into a store, search it, look after it, rerank. Needs the extra ``cli``.

Exit codes: 0 done; 1 a fault of memsafe; 2 a wrong option or model; 3 an input that cannot be used; 4 a store that cannot be used,
or cannot be written; 5 a store that is damaged; 6 memory that does not suffice; 130 stopped by Ctrl-C, to be resumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memsafe import cli_advice
from memsafe.cli_output import (
    INTERRUPTED,
    AsJson,
    MemoryHook,
    StorePath,
    print_json,
    print_table,
    say_how_to_resume,
    say_report,
    shown,
    stoppable,
    told,
)
from memsafe.cli_store import store_app
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, StoreError
from memsafe.events import EventHook

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Embeddings and reranking inside the memory that is there."
)
app.add_typer(store_app, name="store")
cli_advice.register(app)

Model = Annotated[str, typer.Option("--model", "-m", help="A folder, or a name on the hub.")]
Limit = Annotated[str | None, typer.Option(help="The most memory to take on the device, such as 3GiB or 80%.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, xpu or cpu; the best one if left out.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens after which texts are cut; as the model says if left out.")]
Text = Annotated[str, typer.Option(help="Field or column of the texts.")]
Id = Annotated[str | None, typer.Option(help='Field or column of the ids; "id" if there is one.')]


@app.command()
@told
def embed(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A .jsonl, .txt, .parquet, .arrow or .feather file, or a folder of text files."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The folder of the store: new, or with --resume or --update.")
    ],
    model: Model,
    limit: Limit = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a store that is there; begin one if none is.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="The input has changed: compute what is new, drop what is gone.")
    ] = False,
    text: Text = "text",
    id: Id = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in: auto, float32, float16 or bfloat16.")] = None,
    rows: Annotated[str, typer.Option(help="To store: float32 or float16.")] = "float32",
    max_length: MaxLength = None,
    normalize: Annotated[bool, typer.Option(help="Scale rows to length 1, whatever the model does.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Put before every text; the model's own for documents if left out.")
    ] = None,
    block_texts: Annotated[int | None, typer.Option(help="Texts in a block, which is what a crash loses.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--report", help="Write what happened to this HTML page: memory, speed, trouble.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed a corpus into a store. Ctrl-C stops after the block in progress; a second one stops at once."""
    from memsafe.corpus import embed_corpus
    from memsafe.embedder import Embedder
    from memsafe.recording import Recording

    if resume and update:
        raise ConfigError("--resume and --update: give one; an update that was broken off goes on with --update")
    if (output / "manifest.jsonl").exists() and not (resume or update):
        raise StoreError(
            f"{output} is there already; go on with --resume, or, if the input has changed, --update", path=str(output)
        )
    if picture is not None and not picture.parent.is_dir():
        raise ConfigError(f"--report: there is no folder {picture.parent} for the page; make it first")
    memory, recording = MemoryHook(), Recording()
    hooks: list[EventHook] = [memory, recording]
    embedder = Embedder(
        model, device=device, dtype=dtype, max_length=max_length, memory=MemoryPolicy(limit=limit), hooks=hooks
    )
    with embedder, stoppable(output, update=update) as stop, shown(memory, quiet=as_json) as show:
        report = embed_corpus(
            embedder,
            source,
            output,
            text=text,
            id=id,
            dtype=rows,
            update=update,
            block_texts=block_texts,
            normalize=normalize or None,
            prompt=prompt,
            stop=stop,
            progress=show,
        )
    if picture is not None:
        recording.save(picture, dict(report.rows()), title=f"{source.name} with {model}")
    if as_json:
        print_json(report.to_dict())
    else:
        say_report(report, recording)
    if not report.complete:
        say_how_to_resume(output, update=update)
        raise typer.Exit(INTERRUPTED)


@app.command()
@told
def search(
    store: StorePath,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The one the store was made with, if it is elsewhere now.")
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", help="How many.")] = 10,
    metric: Annotated[str, typer.Option(help="cosine or dot.")] = "cosine",
    limit: Limit = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the rows nearest to a query, exactly."""
    from memsafe.corpus import open_store
    from memsafe.embedder import Embedder

    opened = open_store(store)
    if opened.kind != "dense":
        raise ConfigError(
            f"{store} holds {opened.kind} rows, and this command searches dense ones; use open_store({str(store)!r}).search from Python"
        )
    info = opened.info
    settings = {"dtype": info["model"]["dtype"], "max_length": info["model"]["max_length"]}
    name = model or str(info["made_with"].get("model"))
    with Embedder(name, device=device, memory=MemoryPolicy(limit=limit), **settings) as embedder:
        cut = {} if embedder.dimension == opened.dimension else {"truncate_dim": opened.dimension}
        if embedder.identity(kind="query")["model"] != info["model"]["content"]:
            raise StoreError(
                f"{store} was made by {info['made_with'].get('model')!r}, whose content {name!r} does not have; name the right one "
                "with --model",
                path=str(store),
            )
        found = opened.search(embedder.embed_queries([query], **cut), top, metric=metric)
    hits = [{"id": one, "score": float(score), "position": int(place)} for one, score, place in zip(
        found.ids[0], found.scores[0], found.positions[0], strict=True
    )]  # fmt: skip
    if as_json:
        print_json({"hits": hits})
    else:
        print_table(["score", "id"], [[f"{hit['score']:.4f}", str(hit["id"])] for hit in hits])


@app.command()
@told
def rerank(
    query: Annotated[str, typer.Argument(help="What the documents are to answer.")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="The documents: as for embed.")],
    model: Model,
    top: Annotated[int, typer.Option("--top", "-k", help="How many to show.")] = 10,
    text: Text = "text",
    id: Id = None,
    limit: Limit = None,
    device: Device = None,
    max_length: MaxLength = None,
    as_json: AsJson = False,
) -> None:
    """Rank the documents of INPUT, which are held in memory, by how well they answer QUERY."""
    from memsafe.reranker import Reranker
    from memsafe.stores.sources import open_source

    entries = list(open_source(source, text, id))
    with Reranker(model, device=device, max_length=max_length, memory=MemoryPolicy(limit=limit)) as reranker:
        ranked = reranker.rerank(query, [text for _, text in entries], top_n=top)
    hits = [
        {"id": _name(entries[place.index][0], place.index), "score": place.score, "position": place.index}
        for place in ranked
    ]
    if as_json:
        print_json({"hits": hits})
    else:
        print_table(["score", "id"], [[f"{hit['score']:.4f}", str(hit["id"])] for hit in hits])


def _name(given: Any, position: int) -> Any:
    return position if given is None else given
