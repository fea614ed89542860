"""A crosscoder's tensors source by source, as most libraries keep them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from crosscoder_jax.crosscoder import Crosscoder, CrosscoderConfig
from crosscoder_jax.sources import Sources
from crosscoder_jax.sparsity import Gated


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Everything numeric of a crosscoder whose sources have one width; float32.

    ``code = act(sum_s (x_s - mean_s) * scale_s @ w_enc_s + b_enc)`` and
    ``recon_s = (code @ w_dec_s + b_dec_s) / scale_s + mean_s``.
    """

    w_enc: Float[np.ndarray, "source width latent"]
    b_enc: Float[np.ndarray, "latent"]
    w_dec: Float[np.ndarray, "source latent width"]
    b_dec: Float[np.ndarray, "source width"]
    mean: Float[np.ndarray, "source width"]
    """Raw activation units."""
    scale: Float[np.ndarray, "source"]
    threshold: Float[np.ndarray, "*source"]
    """In the units of the scores."""
    latent_threshold: Float[np.ndarray, "latent"] | None = None
    """The thresholds of JumpReLU, in the units of the scores."""

    @classmethod
    def new(cls, *, w_enc: np.ndarray, w_dec: np.ndarray, **given: Any) -> "Weights":
        """Return weights in which everything that is not given is nothing: no bias, no normaliser."""
        num_sources, width, num_latents = w_enc.shape
        nothing = {
            "b_enc": np.zeros(num_latents, np.float32),
            "b_dec": np.zeros((num_sources, width), np.float32),
            "mean": np.zeros((num_sources, width), np.float32),
            "scale": np.ones(num_sources, np.float32),
            "threshold": np.zeros((), np.float32),
        }
        return cls(w_enc=w_enc, w_dec=w_dec, **{**nothing, **given})

    @classmethod
    def of(cls, crosscoder: Crosscoder) -> "Weights":
        """Take a crosscoder apart.

        Raises:
            ValueError: if the sources differ in width, or a group of latents has a cost or a k of its own.
        """
        for group in crosscoder.config.groups:
            if group.k is not None:
                raise ValueError(
                    f"group {group.name!r} has k={group.k} and a threshold of its own, which no other format "
                    "keeps: save as 'crosscoder_jax'"
                )
            if group.cost != 1:
                raise ValueError(
                    f"group {group.name!r} has cost={group.cost}, which no other format keeps: save "
                    "crosscoder_jax.fold_normalization(crosscoder), whose codes hold it"
                )
        if isinstance(crosscoder.config.sparsity, Gated):
            raise ValueError(
                f"sparsity={crosscoder.config.sparsity} has gates and magnitudes, which this format does not "
                "keep: save as 'crosscoder_jax'"
            )
        sources = crosscoder.config.sources
        if len(set(sources.widths)) > 1:
            widths = dict(zip(sources.names, sources.widths, strict=True))
            raise ValueError(
                f"the sources have the widths {widths}, but this format has one width for all: "
                "save as 'crosscoder_jax'"
            )
        shape = (len(sources), sources.widths[0])
        tensors = {name: np.array(getattr(crosscoder, name)[...], np.float32) for name in _NAMES}
        own = crosscoder.latent_threshold
        return cls(
            w_enc=tensors["w_enc"].reshape(*shape, -1),
            b_enc=tensors["b_enc"],
            w_dec=tensors["w_dec"].reshape(-1, *shape).transpose(1, 0, 2),
            b_dec=tensors["b_dec"].reshape(shape),
            mean=tensors["mean"].reshape(shape),
            scale=tensors["scale"],
            threshold=tensors["threshold"],
            latent_threshold=None if own is None else np.array(own[...], np.float32),
        )

    def to_crosscoder(self, sources: Sources, **rules: Any) -> Crosscoder:
        """Put a crosscoder together.

        Args:
            sources: one for each of the weights' sources.
            rules: the other fields of its config, such as ``sparsity``.
        """
        num_sources, width, num_latents = self.w_enc.shape
        config = CrosscoderConfig(sources, num_latents=num_latents, **rules)
        crosscoder = nnx.eval_shape(lambda: Crosscoder(config, key=jax.random.key(0)))
        tensors = {
            "w_enc": self.w_enc.reshape(num_sources * width, num_latents),
            "b_enc": self.b_enc,
            "w_dec": self.w_dec.transpose(1, 0, 2).reshape(num_latents, num_sources * width),
            "b_dec": self.b_dec.reshape(-1),
            "mean": self.mean.reshape(-1),
            "scale": self.scale,
            "threshold": self.threshold,
        }
        if self.latent_threshold is not None:
            tensors["latent_threshold"] = self.latent_threshold
        for name, value in tensors.items():
            variable = getattr(crosscoder, name)
            setattr(crosscoder, name, type(variable)(jnp.asarray(value, jnp.float32)))
        return crosscoder

    @property
    def is_raw(self) -> bool:
        """Whether there is no normaliser."""
        return not self.mean.any() and bool((self.scale == 1).all())

    def raw(self) -> "Weights":
        """Return weights of the same function without a normaliser, to float32 rounding.

        Codes stay the same, decoder norms do not: only for crosscoders whose code does not depend
        on decoder norms.
        """
        if self.is_raw:
            return self
        scale = self.scale[:, None]
        # In double precision, because means can be far larger than what varies.
        centre = self.mean.astype(np.float64) * scale
        shift = sum(part @ w_enc for part, w_enc in zip(centre, self.w_enc, strict=True))
        return dataclasses.replace(
            self,
            w_enc=self.w_enc * scale[:, None],
            b_enc=(self.b_enc - shift).astype(np.float32),
            w_dec=self.w_dec / scale[:, None],
            b_dec=self.b_dec / scale + self.mean,
            mean=np.zeros_like(self.mean),
            scale=np.ones_like(self.scale),
        )


_NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "mean", "scale", "threshold")
