"""What ``apply_ebr`` did or would do, and why not elsewhere, as a value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from .site import Site


@dataclass(frozen=True)
class Placement:
    """One modality: its site, the width of its features, what is known of its output, and what is in the way."""

    modality: str
    site: Site
    width: int | None
    found: str
    problem: str | None = None


@dataclass(frozen=True)
class ApplyReport:
    """``placements``: one for each modality, in order. ``elsewhere``: (module, why it has no head).

    ``status``: "applied", "dry run" or "restored". ``parameters``: numbers that the heads add.
    """

    model: str
    status: str
    name: str
    placements: tuple[Placement, ...]
    elsewhere: tuple[tuple[str, str], ...]
    hidden_dim: int
    latent_dim: int
    psi_dims: tuple[int, ...]
    parameters: int

    @property
    def problems(self) -> list[str]:
        return [f"{p.modality} at {p.site}: {p.problem}" for p in self.placements if p.problem]

    def __str__(self) -> str:
        word = {"dry run": "dry run, nothing was changed", "restored": "restored, the model is as before"}
        h, k = self.hidden_dim, self.latent_dim
        lines = [f"EBR on {self.model}: {word.get(self.status, self.status)}"]
        rows: list[tuple[str, ...]] = [("modality", "module", "gives", "head")]
        for p in self.placements:
            head = f"{p.width}-{h}-{k}-{h}-{p.width}" if not p.problem else f"none: {p.problem}"
            rows.append((p.modality, str(p.site), p.found, head))
        lines += _table(rows)
        if not self.problems:
            psi = "-".join(map(str, (k, *self.psi_dims, len(self.placements))))
            lines.append(f"  discriminator {psi}; {self.parameters:,} parameters in submodule '{self.name}'")
        if self.elsewhere:
            lines.append("No head on")
            lines += _table(list(self.elsewhere))
        return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
