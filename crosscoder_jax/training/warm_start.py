"""Begin a run with the latents of a saved crosscoder: of more sources, of more latents, held or free."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int

from crosscoder_jax.crosscoder import CrosscoderConfig
from crosscoder_jax.groups import LatentGroup, Layout
from crosscoder_jax.publishing import Published
from crosscoder_jax.sharding import place
from crosscoder_jax.training.laws import WarmStart
from crosscoder_jax.training.state import Held, TrainState


def begin_with(state: TrainState, saved: Published, start: WarmStart) -> TrainState:
    """Return the state before the first step with the weights of a saved crosscoder in their places.

    Saved latents keep their order within their group, new ones follow them as they were drawn. A source that
    the saved crosscoder does not have is neither read nor written by saved latents at first. Sources that it
    has keep its normaliser and its decoder bias, in the units of which its weights are. No saved weight is
    changed: groups under which one would have to be are refused.

    Args:
        state: from :func:`init_state`; not changed.
        saved: the crosscoder to begin with, on the host, of which every device gets what it holds.
        start: what its sources are here, and whether it is held.

    Raises:
        ValueError: naming a source, a group or a number of latents of the saved crosscoder that has no place
            in the run's, or a group that would change saved weights.
    """
    crosscoder = nnx.merge(state.graphdef, state.params, state.fixed, copy=True)
    config, shardings = crosscoder.config, crosscoder.shardings
    columns = _columns(saved.config, config, start)
    latents = _latents(saved.config.layout, config.layout)
    _check_groups(saved.config, config, start)
    given = saved.tensors
    is_saved_width = _marked(columns, config.sources.width)
    is_saved_latent = place(_marked(latents, config.num_latents), shardings.per_latent_l)

    def in_place(name: str, spec: jax.P | None, *axes: Int[np.ndarray, "_"]) -> jax.Array:
        variable = getattr(crosscoder, name)
        spread = np.zeros(variable.shape, variable.dtype)
        spread[np.ix_(*axes)] = given[name]
        return place(spread, spec)

    w_enc = in_place("w_enc", shardings.w_enc_wl, columns, latents)
    w_dec = in_place("w_dec", shardings.w_dec_lw, latents, columns)
    crosscoder.w_enc[...] = jnp.where(is_saved_latent, w_enc, crosscoder.w_enc[...])
    crosscoder.w_dec[...] = jnp.where(is_saved_latent[:, None], w_dec, crosscoder.w_dec[...])
    learned = set(config.rule_parameters) & set(saved.config.rule_parameters)
    for name in ("b_enc", *sorted(learned)):
        value = in_place(name, shardings.per_latent_l, latents)
        getattr(crosscoder, name)[...] = jnp.where(is_saved_latent, value, getattr(crosscoder, name)[...])
    entries = [config.sources.names.index(name) for name in saved_names(saved.config, start)]
    for name, places in {"b_dec": columns, "mean": columns, "scale": np.array(entries)}.items():
        variable = getattr(crosscoder, name)
        variable[...] = variable[...].at[places].set(given[name])
    _, params, fixed = nnx.split(crosscoder, nnx.Param, ...)
    held = Held(is_saved_latent, place(is_saved_width, shardings.replicated)) if start.is_frozen else None
    return dataclasses.replace(state, params=params, fixed=fixed, held=held)


def saved_names(saved: CrosscoderConfig, start: WarmStart) -> tuple[str, ...]:
    """Return what the sources of a saved crosscoder are called in the run that begins with it.

    Raises:
        ValueError: if as many names as it has sources are not given.
    """
    names = saved.sources.names if start.sources is None else start.sources
    if len(names) != len(saved.sources):
        raise ValueError(
            f"sources={names} of the warm start must be one for each of the saved {saved.sources.names}"
        )
    return names


def _columns(saved: CrosscoderConfig, config: CrosscoderConfig, start: WarmStart) -> Int[np.ndarray, "_"]:
    """Return where the saved crosscoder's width lies on the run's."""
    places = dict(zip(config.sources.names, config.sources.slices(), strict=True))
    found = []
    for name, entry in zip(saved_names(saved, start), saved.sources, strict=True):
        if name not in places:
            raise ValueError(
                f"the saved crosscoder reads {name!r}, but the run reads {tuple(places)}: say with 'sources' "
                "of the warm start what each of its sources is here"
            )
        here = places[name]
        if here.stop - here.start != entry.width:
            raise ValueError(
                f"source {name!r} has width {entry.width} in the saved crosscoder and "
                f"{here.stop - here.start} in the run: begin with one of the same models"
            )
        found.append(np.arange(here.start, here.stop))
    return np.concatenate(found)


def _latents(saved: Layout, layout: Layout) -> Int[np.ndarray, "_"]:
    """Return where the saved latents lie: first in the group of the same name."""
    theirs, ours = np.array(saved.names()), np.array(layout.names())
    found = np.empty(len(theirs), int)
    for name in dict.fromkeys(saved.names()):
        needed, there = np.flatnonzero(theirs == name), np.flatnonzero(ours == name)
        if len(there) < len(needed):
            raise ValueError(
                f"the saved crosscoder has {len(needed)} latents in the group {name!r} and the run "
                f"{len(there)} of {layout.num_latents}: give the run more latents, or the group a larger "
                "share"
            )
        found[needed] = there[: len(needed)]
    return found


def _check_groups(saved: CrosscoderConfig, config: CrosscoderConfig, start: WarmStart) -> None:
    """Refuse a group of the run under which saved weights cannot stay as they are."""
    here = dict(zip(saved.sources.names, saved_names(saved, start), strict=True))
    theirs = {group.name: group for group in saved.groups}
    for group in config.groups:
        if group.name in theirs:
            _check_sources(group, theirs[group.name], here, config.sources.names)
            _check_tie(group, theirs[group.name], here, config.sources.names)


def _check_sources(group: LatentGroup, old: LatentGroup, here: dict[str, str], names: Sequence[str]) -> None:
    for field in ("reads", "writes"):
        had = tuple(here[name] for name in getattr(old, field) or here)
        has = getattr(group, field) or names
        if not set(had) <= set(has):
            raise ValueError(
                f"group {group.name!r} {field} {tuple(has)}, but in the saved crosscoder it {field} {had}: "
                f"weights would be lost. Give it {field}={had}, or more"
            )


def _check_tie(group: LatentGroup, old: LatentGroup, here: dict[str, str], names: Sequence[str]) -> None:
    had = tuple(here[name] for name in old.writes or here)
    has = group.writes or names
    tie = "is_tied" if group.is_tied else "is_norm_tied"
    if not (group.is_tied or group.is_norm_tied) or len(has) == 1:
        return
    if set(had) != set(has):
        raise ValueError(
            f"group {group.name!r} has {tie}=True and writes {tuple(has)}, but in the saved crosscoder it "
            f"writes {had}: saved decoders would be averaged with zeros. Restrict it to writes={had}, or set "
            f"{tie}=False"
        )
    if not (old.is_tied or (group.is_norm_tied and old.is_norm_tied)):
        raise ValueError(
            f"group {group.name!r} has {tie}=True and had not in the saved crosscoder, whose decoders it "
            f"would change: set {tie}=False"
        )


def _marked(places: Int[np.ndarray, "_"], size: int) -> Bool[np.ndarray, "_"]:
    marked = np.zeros(size, bool)
    marked[places] = True
    return marked
