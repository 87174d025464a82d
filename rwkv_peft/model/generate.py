"""Text from a model, one token at a time: state in, state out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from rwkv_peft.common.errors import UserError
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Message, Template
from rwkv_peft.text.tokenizer import END_OF_DOC, VOCAB_SIZE, Utf8Stream, encode

COLDEST = 1e-4  # below this, the likeliest token has all of the share
PREFILL = 512  # tokens of a prompt that go through at once


@torch.no_grad()  # (not inference_mode: what layers keep for later calls may be wanted by a training)
def advance(model, ids: Sequence[int], state=None):
    """Feed tokens; returns the logits after the last one, float32 [V], and the state."""
    rows, device = model.geometry.vocab_size, model.ln_out.weight.device
    if max(ids) >= rows:
        raise UserError(f"The model's vocabulary ends at {rows - 1}, but the text needs token {max(ids)}.")
    x = torch.empty(0)
    for begin in range(0, len(ids), PREFILL):
        piece = torch.tensor([ids[begin : begin + PREFILL]], device=device)
        x, state = model.features(piece, state)
    # rows behind the vocabulary stand for nothing
    return model.head(x[0, -1]).float()[:VOCAB_SIZE], state


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator, top_k: int = 0) -> int:
    """Draw the next token.

    Args:
        logits: [V].
        temperature: 0: the likeliest token.
        top_p: Only the likeliest that together have this share.
        generator: Draws.
        top_k: Before that, only so many of the likeliest; 0: all.

    Raises:
        UserError: a logit is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise UserError("The model's answer is not a number: its weights hold NaN or infinity. Take an earlier epoch.")
    if temperature < COLDEST:
        return int(logits.argmax())
    shares, order = torch.softmax(logits.cpu().double() / temperature, -1).sort(descending=True, stable=True)
    if top_k:
        shares = shares[:top_k] / shares[:top_k].sum()
    keep = shares.cumsum(-1) - shares < top_p  # the first one always stays
    keep[0] = True
    shares = shares * keep
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def generate(
    model,
    logits: Tensor,
    state,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stops: Sequence[str],
    stop_tokens: Collection[int] = (END_OF_DOC,),
    top_k: int = 0,
) -> Iterator[str]:
    """Yield pieces of text until a stop token, a stop string or max_tokens; never half a character.

    Text that might be the beginning of a stop string is kept back until it is clear.

    Args:
        model: For generation (`for_generating`).
        logits: After the prompt, [V].
        state: After the prompt.
        max_tokens: The most tokens.
        temperature: As in `choose`.
        top_p: As in `choose`.
        seed: Of the draws.
        stops: Stop strings.
        stop_tokens: Should have token 0, the end of the document, among them.
        top_k: As in `choose`.
    """
    generator = torch.Generator().manual_seed(seed)
    stream, pending = Utf8Stream(), ""
    for i in range(max_tokens):
        token = choose(logits, temperature, top_p, generator, top_k)
        if token in stop_tokens:
            break
        pending += stream.push(token)
        at = [pending.index(stop) for stop in stops if stop in pending]
        if at:
            yield pending[: min(at)]
            return
        ready = len(pending) - longest_beginning(pending, stops)
        if ready:
            yield pending[:ready]
            pending = pending[ready:]
        if i + 1 < max_tokens:
            logits, state = advance(model, [token], state)
    if pending:
        yield pending


def likeliest_answer(
    model, form: Template, question: str, most: int, stop_tokens: Collection[int] = (END_OF_DOC,), bos: bool = False
) -> str:
    """Return the greedy answer to a single question.

    Args:
        model: For generation.
        form: The prompt template.
        question: The user's turn.
        most: The most tokens.
        stop_tokens: As in `generate`.
        bos: Begin with token 0.
    """
    ids = [END_OF_DOC] * bos + encode(form.prompt([Message(Role.USER, question)]))
    logits, state = advance(model, ids)
    said = generate(model, logits, state, most, 0.0, 1.0, 0, form.stops(), stop_tokens)
    return form.opening + "".join(said)


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of text could be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )
