"""Where chosen latents fire most strongly on held-out tokens, and the text around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.diffing.evidence import TopActivations, init_top, update_top
from crosscoder_jax.diffing.reading import placed_column, placed_tokens, read_pass
from crosscoder_jax.diffing.snippets import Snippet, read_snippets
from crosscoder_jax.sharding import place, to_host
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Acts, Latents, Progress


def find_snippets(
    crosscoder: Crosscoder,
    view: TokenView,
    selected: Integer[np.ndarray, "selected"],
    config: DiffConfig,
    progress: Progress | None,
) -> dict[int, list[Snippet]]:
    """Take the second pass, for the selected latents, and read the text around their peaks.

    Args:
        crosscoder: with its inference threshold.
        view: held-out tokens, in raw units.
        selected: the latents.
        config: how many snippets of each, and how long.
        progress: told the tokens read.

    Returns:
        Latent -> snippets, strongest first, in the order of ``selected``.

    Raises:
        StoreError: if a file of the store is damaged.
        ValueError: if the store has 2^31 tokens or more.
    """
    if not selected.size:
        return {}
    if view.store.num_tokens > np.iinfo(np.int32).max:
        raise ValueError(
            f"num_snippet_latents={config.num_snippet_latents}: the store's {view.store.num_tokens} tokens "
            f"are more than snippets can point to, {np.iinfo(np.int32).max}: diff without snippets (0)"
        )
    stored = view.store.sources
    chosen = jnp.asarray(selected, jnp.int32)
    top = init_top(selected.size, config.snippets_per_latent)
    for batch in read_pass(view, config, progress, earlier_passes=1):
        acts, documents, is_valid = placed_tokens(batch, crosscoder.shardings)
        top = _update_top(
            top,
            crosscoder,
            acts,
            chosen,
            placed_column(batch.token_index, crosscoder.shardings),
            documents,
            is_valid,
            stored=stored,
            one_per_document=config.is_one_snippet_per_document,
        )

    def encode(acts: np.ndarray, latents: np.ndarray) -> np.ndarray:
        return _encode_rows(crosscoder, acts, latents, stored, config.batch_size)

    return read_snippets(view.store, top, selected, encode, context=config.snippet_context)


@functools.partial(jax.jit, static_argnames=("stored", "one_per_document"))
def _update_top(
    top: TopActivations,
    crosscoder: Crosscoder,
    stored_acts: Acts,
    selected: Int[Array, "selected"],
    tokens: Int[Array, "batch"],
    documents: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    stored: Sources,
    one_per_document: bool,
) -> TopActivations:
    return update_top(
        top,
        _encode(crosscoder, stored_acts, stored),
        selected,
        tokens,
        documents,
        is_valid,
        one_per_document=one_per_document,
        shardings=crosscoder.shardings,
    )


def _encode(crosscoder: Crosscoder, stored_acts: Acts, stored: Sources) -> Latents:
    return crosscoder.encode(crosscoder.config.sources.read(stored_acts, stored))


@functools.partial(jax.jit, static_argnames="stored")
def _selected_codes(
    crosscoder: Crosscoder, stored_acts: Acts, selected: Int[Array, "selected"], stored: Sources
) -> Float[Array, "batch selected"]:
    code = _encode(crosscoder, stored_acts, stored)
    return code.at[:, selected].get(out_sharding=crosscoder.shardings.acts_bw)


def _encode_rows(
    crosscoder: Crosscoder,
    acts: np.ndarray,
    latents: Integer[np.ndarray, "selected"],
    stored: Sources,
    batch_size: int,
) -> Float[np.ndarray, "token selected"]:
    """Encode any number of rows in batches of one shape."""
    chosen, parts = jnp.asarray(latents, jnp.int32), []
    for start in range(0, len(acts), batch_size):
        part = acts[start : start + batch_size]
        padded = np.zeros((batch_size, acts.shape[1]), acts.dtype)
        padded[: len(part)] = part
        placed = place(padded, crosscoder.shardings.acts_bw)
        parts.append(to_host(_selected_codes(crosscoder, placed, chosen, stored))[: len(part)])
    return np.concatenate(parts)
