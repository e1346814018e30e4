"""``EBRHead``: the encode-reconstruct-discriminate head, a drop-in layer behind unimodal encoders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmc_fast.functional import EBROutput, ebr_step

__all__ = ["EBRHead"]


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(fan_in, fan_out)] if n == 0 else [nn.ReLU(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


class EBRHead(nn.Module):
    """Explicit basis reallocation for m modalities of widths ``dims``.

    ``recovered, latents, L_md, L_rec = head(features)``: feed ``recovered`` to your fusion in place of ``features``
    and add ``L_md`` (its reversal is already inside) to your loss. Formulas: :func:`mmc_fast.functional.ebr_step`.

    Args:
        dims: widths ``d_i`` of the features, a sequence or an ordered mapping name -> width.
        latent_dim: k. hidden_dim: h. psi_dims: hidden widths of the discriminator ψ.
        residual, normalize, backend, recompute: see :func:`mmc_fast.functional.ebr_step`.

    Parameters are plain layers, and the state dict is theirs: ``encoders[i]`` = Linear(d_i, h), ReLU, Linear(h, k);
    ``decoders[i]`` = Linear(k, h), ReLU, Linear(h, d_i); ``discriminator`` = Linear(k, p_1), ReLU, ..., Linear(p, m).

    Raises:
        ValueError: no modality, a width below 1, or (in the call) names, shapes or dtypes that do not fit.

    Source: Chaudhuri et al., ICML 2025, section 3.3; sizes from its appendix (h 1024, k 512, ψ 512-256).
    """

    def __init__(
        self,
        dims: Sequence[int] | Mapping[str, int],
        latent_dim: int = 512,
        hidden_dim: int = 1024,
        psi_dims: Sequence[int] = (512, 256),
        residual: bool = False,
        normalize: bool = False,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.names = list(dims) if isinstance(dims, Mapping) else None
        self.dims = [int(d) for d in (dims.values() if isinstance(dims, Mapping) else dims)]
        sizes = {"latent_dim": latent_dim, "hidden_dim": hidden_dim}
        sizes |= {f"dims[{i}]": d for i, d in enumerate(self.dims)} | {
            f"psi_dims[{i}]": p for i, p in enumerate(psi_dims)
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"EBRHead: {name} is {value}; widths must be at least 1")
        if not self.dims:
            raise ValueError("EBRHead: dims is empty; give the width of at least one modality")
        self.latent_dim, self.hidden_dim, self.psi_dims = latent_dim, hidden_dim, tuple(psi_dims)
        self.residual, self.normalize = residual, normalize
        self.backend, self.recompute = backend, recompute
        self.encoders = nn.ModuleList(_mlp(d, hidden_dim, latent_dim) for d in self.dims)
        self.decoders = nn.ModuleList(_mlp(latent_dim, hidden_dim, d) for d in self.dims)
        self.discriminator = _mlp(latent_dim, *self.psi_dims, len(self.dims))

    def forward(
        self,
        features: Sequence[Tensor | None] | Mapping[str, Tensor | None],
        present: Tensor | None = None,
        source: Tensor | None = None,
        reversal: float | Tensor = 1.0,
        normalizer: Tensor | None = None,
    ) -> EBROutput:
        """Apply the head; a mapping in gives a mapping out. Arguments: :func:`mmc_fast.functional.ebr_step`."""
        named = isinstance(features, Mapping)
        out = ebr_step(
            self._ordered(features) if isinstance(features, Mapping) else list(features),
            [_tensors(e) for e in self.encoders],
            [_tensors(d) for d in self.decoders],
            _tensors(self.discriminator),
            present=present,
            source=source,
            reversal=reversal,
            normalizer=normalizer,
            residual=self.residual,
            normalize=self.normalize,
            backend=self.backend,
            recompute=self.recompute,
        )
        if named:
            out = out._replace(recovered={name: out.recovered[i] for i, name in enumerate(self.names or [])})
        return out

    def _ordered(self, features: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        if self.names is None:
            raise ValueError(
                "EBRHead: features is a mapping but dims was a sequence; build the head with {name: width}"
            )
        if set(features) != set(self.names):
            raise ValueError(
                f"EBRHead: features has {sorted(features)}; expected {self.names} (None for an absent modality)"
            )
        return [features[name] for name in self.names]

    def extra_repr(self) -> str:
        return f"dims={self.dims}, latent_dim={self.latent_dim}, residual={self.residual}, normalize={self.normalize}"


def _tensors(layers: nn.Module) -> list[Tensor]:
    out: list[Tensor] = []
    for layer in layers if isinstance(layers, nn.Sequential) else layers.children():
        if type(layer) is nn.Linear and "weight" in layer._parameters and "bias" in layer._parameters:
            out += layer._parameters.values()  # type: ignore[arg-type]  # several times faster than the attributes
        elif isinstance(layer, nn.Linear):
            out += (layer.weight, layer.bias)
    return out
