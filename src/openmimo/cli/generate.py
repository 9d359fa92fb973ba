"""`openmimo generate`: continue prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from openmimo.cli.engine_options import Activations, CacheFormat, DraftHeads, ModelFolder, RunnerName, Verify, Weights


def generate_command(
    model: ModelFolder,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Send the prompt as a chat message, or as it is.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many most probable tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    draft_heads: DraftHeads = "auto",
    weights: Weights = "bf16",
    activations: Activations = "auto",
    cache: CacheFormat = "auto",
    runner: RunnerName = "auto",
    verify: Verify = False,
) -> None:
    """Continue one or more prompts; drafts make decoding faster and never change the text."""
    import time

    from openmimo.cli.chat import parse_draft_heads, printable
    from openmimo.engine import DraftStats, Engine, SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed)
    heads = parse_draft_heads(draft_heads)
    engine = Engine(
        model,
        draft_heads=heads,
        weights=weights,
        activations=activations,
        cache=cache,
        runner=runner,
        verify=verify,
    )
    if chat:
        from openmimo.evals.accuracy import chat_renderer

        render = chat_renderer(engine)
        prompts = [render(text) for text in prompt]
    else:
        prompts = list(prompt)
    started = time.perf_counter()
    completions = engine.generate(prompts, params)
    seconds = time.perf_counter() - started
    for text, completion in zip(prompt, completions, strict=True):
        typer.echo(printable(completion.text if chat else text + completion.text))
        if completion.finish_reason == "error":
            typer.echo("[broken off: the model's logits are no numbers here; are its weights whole?]", err=True)
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    draft = DraftStats.merge(completion.draft for completion in completions)
    typer.echo(
        f"[{num_tokens} tokens, acceptance length {draft.acceptance_length:.2f}, {num_tokens / seconds:.1f} tokens/s]",
        err=True,
    )
