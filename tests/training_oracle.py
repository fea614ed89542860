"""One optimiser step in float64 NumPy: the slow reference of the tests of training."""

import numpy as np

import crosscoder_jax as cc


class Oracle:
    """One optimiser step in float64 NumPy, gradients written out by hand."""

    def __init__(self, config, parameters):
        self.config = config
        self.p = {name: value.astype(np.float64) for name, value in parameters.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.since_fired = np.zeros(config.crosscoder.num_latents, np.int64)
        self.t = 0

    def norms(self):
        return np.stack([np.linalg.norm(part, axis=1) for part in self.split(self.p["w_dec"])])

    def split(self, values):
        return self.config.crosscoder.sources.split(values)

    def weights(self):
        """What latents weigh in each source: the same in all, unless each has its own code."""
        norms, code_norm = self.norms(), self.config.crosscoder.code_norm
        if isinstance(code_norm, cc.Decoupled):
            return norms
        concatenated = np.linalg.norm(self.p["w_dec"], axis=1)
        mixed = concatenated + 0.1 * norms.sum(axis=0)
        shared = mixed if isinstance(code_norm, cc.MixedNorms) else norms.sum(axis=0)
        return np.broadcast_to(shared, norms.shape)

    def select(self, acts):
        """The rule of training, by a sort: ``[source, batch, latent]``."""
        sparsity, weights = self.config.crosscoder.sparsity, self.weights()
        if isinstance(sparsity, cc.ReLU):
            return np.broadcast_to(acts > 0, (len(weights), *acts.shape))
        scores = acts * weights[:, None]
        cuts = np.sort(scores.reshape(len(weights), -1), axis=1)[:, -round(sparsity.k * len(acts))]
        return (scores >= cuts[:, None, None]) & (scores > 0)

    def reconstruction(self, error):
        """The loss and its gradient with respect to the reconstruction."""
        if isinstance(self.config.loss, cc.SquaredError):
            return np.mean(np.sum(error**2, axis=1)), -2 * error / len(error)
        parts = self.split(error)
        lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
        gradient = [
            -part / length / len(error) / len(parts) for part, length in zip(parts, lengths, strict=True)
        ]
        return np.mean(np.concatenate(lengths)), np.concatenate(gradient, axis=1)

    def gradients(self, x):
        """Losses, gradients of all parameters, and which entries of the codes are kept."""
        p, num_tokens = self.p, len(x)
        acts = np.maximum(x @ p["w_enc"] + p["b_enc"], 0)
        kept = self.select(acts)
        codes = acts * kept
        decoders = self.split(p["w_dec"])
        decoded = [code @ part for code, part in zip(codes, decoders, strict=True)]
        error = x - np.concatenate(decoded, axis=1) - p["b_dec"]
        loss, d_recon = self.reconstruction(error)
        losses = {"loss/reconstruction": loss}
        of_sources = list(zip(self.split(d_recon), codes, decoders, kept, strict=True))
        d_code = sum((d @ part.T) * mask for d, _, part, mask in of_sources)
        d_w_dec = np.concatenate([code.T @ d for d, code, _, _ in of_sources], axis=1)
        if self.config.l1 is not None:
            rise = self.config.l1.warmup_steps
            weight = self.config.l1.weight * (min(self.t / rise, 1.0) if rise else 1.0)
            code = codes[0]
            losses["loss/l1"] = weight * np.mean(code @ self.norms().sum(axis=0))
            d_code = d_code + weight * self.norms().sum(axis=0) / num_tokens
            units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in self.split(p["w_dec"])]
            d_w_dec = d_w_dec + weight * code.mean(axis=0)[:, None] * np.concatenate(units, axis=1)
        d_acts = d_code * kept.any(axis=0)
        self.since_fired = np.where(kept.any(axis=(0, 1)), 0, self.since_fired + num_tokens)
        is_dead = self.since_fired >= (self.config.aux_k.dead_after_tokens if self.config.aux_k else np.inf)
        losses["loss/aux_k"], more_acts, more_w_dec = self.aux_k(acts, error, is_dead)
        d_pre = (d_acts + more_acts) * (acts > 0)
        gradients = {
            "w_enc": x.T @ d_pre,
            "b_enc": d_pre.sum(axis=0),
            "w_dec": d_w_dec + more_w_dec,
            "b_dec": d_recon.sum(axis=0),
        }
        return losses, gradients, kept

    def aux_k(self, acts, error, is_dead):
        """Science 3.2: residual detached, ranked by score, decoded without bias, over its variance."""
        if not is_dead.any():
            return 0.0, 0.0, 0.0
        settings = self.config.aux_k
        k = min(settings.k_aux or max(self.config.crosscoder.sources.widths) // 2, is_dead.sum())
        dead = acts * is_dead
        weights = self.weights()
        is_decoupled = isinstance(self.config.crosscoder.code_norm, cc.Decoupled)
        scores = dead * (weights.sum(axis=0) if is_decoupled else weights[0])
        kept = (scores >= np.sort(scores, axis=1)[:, -k][:, None]) & (scores > 0)
        code = dead * kept
        missed = error - code @ self.p["w_dec"]
        spread = np.mean(np.sum((error - error.mean(axis=0)) ** 2, axis=1))
        factor = settings.weight / len(error) / spread
        d_recon = -2 * missed * factor
        loss = np.sum(missed**2) * factor
        return loss, (d_recon @ self.p["w_dec"].T) * kept, code.T @ d_recon

    def rate(self):
        config = self.config
        decay = min(round(config.decay_fraction * config.num_steps), config.num_steps - config.warmup_steps)
        rise = min(self.t / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        fall = min((config.num_steps - self.t) / decay, 1.0) if decay else 1.0
        return config.learning_rate * rise * fall

    def step(self, x):
        config = self.config
        losses, gradients, kept = self.gradients(x.astype(np.float64))
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        factor = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))
        rate, self.t = self.rate(), self.t + 1
        for name, raw in gradients.items():
            g = raw * factor
            self.m[name] = config.optimizer.b1 * self.m[name] + (1 - config.optimizer.b1) * g
            self.v[name] = config.optimizer.b2 * self.v[name] + (1 - config.optimizer.b2) * g**2
            m = self.m[name] / (1 - config.optimizer.b1**self.t)
            v = self.v[name] / (1 - config.optimizer.b2**self.t)
            self.p[name] = self.p[name] - rate * m / (np.sqrt(v) + config.optimizer.eps)
        return {**losses, "loss": sum(losses.values()), "grad_norm": norm, "lr": rate, "kept": kept}
