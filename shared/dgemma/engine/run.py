"""Replies to prompts that begin together: an engine for one call, driven by whoever wants its events."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.engine import Engine
from dgemma.engine.events import Event
from dgemma.engine.request import Request
from dgemma.errors import ConfigError, PromptError
from dgemma.network.runner import Runner
from dgemma.settings import GenerationConfig, number, shown
from dgemma.text.messages import is_conversation
from dgemma.text.tokenizer import Tokenizer, needed


def generate(
    runner: Runner,
    tokenizer: Tokenizer | None,
    config: GenerationConfig,
    prompt: Sequence[Any],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    seed: int | None = None,
    row_ids: Sequence[int] | None = None,
    continue_final_message: bool = False,
    control_tokens: bool = False,
    stop: Sequence[str] = (),
    deadline: float | None = None,
    max_rows: int | None = None,
) -> Iterator[Event]:
    """Replies to one prompt or a batch, as events: see `dgemma.model.Model.generate`.

    `tokenizer` may be None: prompts are token ids then, and replies have no text.
    """

    def encode(messages: Any) -> list[int]:
        return needed(tokenizer).encode_chat(
            messages,
            tools,
            thinking,
            not continue_final_message,
            continue_final_message=continue_final_message,
            control_tokens=control_tokens,
        )

    prompts = _prompts(runner, prompt, encode)
    ids = sampler.row_ids(prompts) if row_ids is None else _row_ids(row_ids)
    if len(ids) != len(prompts):
        raise PromptError(f"{len(ids)} row ids for {len(prompts)} prompts")
    seed = secrets.randbits(63) if seed is None else number("seed", seed)
    requests = [
        Request(tokens, config, seed, id, stop=tuple(stop), deadline=deadline, row=row)
        for row, (id, tokens) in enumerate(zip(ids, prompts, strict=True))
    ]
    most = len(requests) if max_rows is None else number("max_rows", max_rows)
    engine = Engine(runner, tokenizer, max_rows=most, queue=len(requests))
    for request in requests:
        engine.check(request)
    return events(engine, requests)


def events(engine: Engine, requests: Sequence[Request]) -> Iterator[Event]:
    """The events of requests that begin together, on an engine that is closed at the end.

    Its clock stands still while the consumer holds one.
    """
    with engine:
        handles = [engine.submit(request) for request in requests]
        going = True
        while going:
            going = engine.step()
            for handle in handles:
                for event in handle.taken():
                    with engine.clock.held():
                        yield event


def _row_ids(ids: Sequence[int]) -> list[int]:
    if not isinstance(ids, Sequence | np.ndarray):
        raise ConfigError(f"row_ids has the unusable value {shown(ids)}")
    return [number("row_ids", id) for id in ids]


def _prompts(runner: Runner, prompt: Sequence[Any], encode: Callable[[Any], list[int]]) -> list[list[int]]:
    """Token ids of each row, from any form of prompt."""
    if not isinstance(prompt, list | tuple | np.ndarray) or not len(prompt):
        raise PromptError("a prompt is a list of messages, a list of token ids, or a list of either")
    many = prompt if isinstance(prompt[0], list | tuple | np.ndarray) else [prompt]
    return [
        encode(one) if is_conversation(one) else [int(token) for token in runner.check_tokens(one)]
        for one in many
    ]
