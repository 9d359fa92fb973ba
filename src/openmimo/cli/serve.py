"""`openmimo serve`: the HTTP server and its page."""

from __future__ import annotations

from typing import Annotated

import typer

from openmimo.cli.engine_options import Activations, CacheFormat, DraftHeads, ModelFolder, RunnerName, Verify, Weights


def serve_command(
    model: ModelFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; a public one needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="OPENMIMO_API_KEY", help="Key that every route but /health asks for.")
    ] = "",
    admin_key: Annotated[str, typer.Option(envvar="OPENMIMO_ADMIN_KEY", help="Key of the /admin routes.")] = "",
    name: Annotated[str, typer.Option(help="The model's name for clients; the folder's by default.")] = "",
    system: Annotated[
        str | None, typer.Option(help="System message where a conversation has none; the template's by default.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Where a request does not say.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Where a request does not say.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens where a request does not say.")] = 2048,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; others get status 429.")] = 256,
    step_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a step, prompts in pieces.")] = 512,
    prefix_cache_mib: Annotated[
        int, typer.Option(min=0, help="Memory for the beginnings of texts that come again, in MiB; 0: none.")
    ] = 256,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this server, without a key; may be given several times.")
    ] = None,
    draft_heads: DraftHeads = "auto",
    weights: Weights = "bf16",
    activations: Activations = "auto",
    cache: CacheFormat = "auto",
    runner: RunnerName = "auto",
    verify: Verify = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the page at /.")] = True,
    log_requests: Annotated[bool, typer.Option(help="A line of JSON on standard error for every request.")] = False,
) -> None:
    """Serve a model under OpenAI's and Anthropic's conventions, with a page to chat on."""
    from openmimo.errors import RequestError

    try:
        from openmimo.server.app import create_app
        from openmimo.server.options import ServerOptions
        from openmimo.server.run import serve
    except ModuleNotFoundError as error:
        raise RequestError(f"the server needs {error.name}; install it with: pip install 'openmimo[server]'") from error

    from openmimo.cli.chat import parse_draft_heads
    from openmimo.engine import Engine, resolve_model_folder

    folder = resolve_model_folder(model)
    default_name = folder.parent.name if folder.name == "model" else folder.name
    options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        admin_key=admin_key,
        model_name=name or default_name,
        system_prompt=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        max_waiting=max_waiting,
        allowed_hosts=tuple(allowed_host or ()),
        page=page,
    )
    engine = Engine(
        folder,
        draft_heads=parse_draft_heads(draft_heads),
        weights=weights,
        activations=activations,
        cache=cache,
        runner=runner,
        verify=verify,
        max_batch=max_batch,
        step_tokens=step_tokens,
        prefix_cache_bytes=prefix_cache_mib << 20,
    )
    where = f"http://{'localhost' if options.is_local else host}:{port}"
    typer.echo(f"{options.model_name} on {where}" + ("/" if page else "/v1") + "; Ctrl-C stops", err=True)
    serve(create_app(engine, options), options, log_requests=log_requests)
