"""The plan of ``apply_ebr``: which modules are meant, how wide their features are, what is in the way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import integer
from mmc_fast.errors import InputError

from .report import Placement
from .site import Site, describe_output
from .trace import Ran

# Layers that put features into dimension 1.
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
# Layers that keep the width of their input: the width of a Sequential is that of the last layer before them.
_KEEPS_WIDTH = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Dropout, nn.Identity)


def find_sites(model: nn.Module, at: Mapping[str, str | Site]) -> dict[str, Site]:
    """``at`` with every entry as a :class:`Site`, in the order given.

    Raises:
        InputError: nothing named, an unknown module, one module named twice, or one inside of another.
    """
    if not isinstance(at, Mapping) or not at:
        raise InputError("apply_ebr: at is empty; give {modality: name of the submodule that returns its features}")
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    sites = {str(m): s if isinstance(s, Site) else Site(str(s)) for m, s in at.items()}
    owner: dict[int, str] = {}
    for modality, site in sites.items():
        if not modality or "." in modality:
            raise InputError(f"apply_ebr: a modality is named {modality!r}; give a word without dots, it becomes a key")
        if site.module not in known:
            raise unknown_module(site.module, list(known))
        module = known[site.module]
        other = sites[owner.setdefault(id(module), modality)]
        apart = other.path != site.path or (None not in (other.call, site.call) and other.call != site.call)
        if other is not site and (other.module != site.module or not apart):
            raise InputError(
                f"apply_ebr: '{modality}' and '{owner[id(module)]}' name one and the same module ({site.module}); name "
                f"another one, or tell its calls apart: Site({site.module!r}, call=0) and Site({site.module!r}, call=1)"
            )
    for modality, site in sites.items():
        for inner in known[site.module].modules():
            if inner is not known[site.module] and id(inner) in owner:
                raise InputError(
                    f"apply_ebr: the module of '{owner[id(inner)]}' lies inside that of '{modality}' ({site.module}); "
                    "name modules that do not contain each other"
                )
    return sites


def unknown_module(name: str, known: Sequence[str]) -> InputError:
    """The error of an unknown submodule: nearest names first, never a list of thousands."""
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [k for k in known if k.rsplit(".", 1)[-1] == last and k not in close][: 3 - len(close)]
    if close:
        return InputError(f"apply_ebr: the model has no submodule {name!r}; nearest: {', '.join(close)}")
    return unknown("submodule", name, [k for k in known if "." not in k])


def candidates(model: nn.Module, sites: Mapping[str, Site]) -> list[str]:
    """Modules that a reader might ask about: children of the model and siblings of sites, less sites and parents."""
    taken = {site.module for site in sites.values()}
    parents = {""} | {module.rsplit(".", 1)[0] for module in taken if "." in module}
    names = [
        f"{parent}.{child}" if parent else child
        for parent in sorted(parents)
        for child, _ in model.get_submodule(parent).named_children()
    ]
    return [n for n in names if n not in taken and not any(t.startswith(n + ".") for t in taken)]


def place(
    model: nn.Module, sites: Mapping[str, Site], dims: Mapping[str, int], ran: Mapping[str, Ran], repeats: str
) -> list[Placement]:
    """One :class:`Placement` for each site; ``ran`` is empty where no example was run.

    Raises:
        InputError: ``dims`` names an unknown modality or holds something else than a width.
    """
    for modality, given in dims.items():
        if modality not in sites:
            raise unknown("modality in dims", modality, list(sites))
        if (integer(given) or 0) < 1:
            raise InputError(f"apply_ebr: dims['{modality}'] is {given!r}; give a width of 1 or more")
    placements = []
    for modality, site in sites.items():
        width: int | None = dims.get(modality)
        found, problem = "-", None
        record = ran.get(site.module)
        if record is not None and record.calls == 0:
            problem = "does not run in the forward on example (or is called as .forward, which skips hooks)"
        elif record is not None:
            seen, found, problem = _seen(site, model.get_submodule(site.module), record, repeats)
            if width is not None and seen is not None and seen != width:
                problem = f"gives width {seen} on example, but dims says {width}"
            width = seen if width is None else width
        elif site.feature_dim is None and _channels_first(model.get_submodule(site.module)):
            problem = (
                f"its features lie in dimension 1 if it gives maps; say so: Site({site.module!r}, feature_dim=1), or -1 for "
                "the last one, or give an example of the model's arguments"
            )
        elif width is None:
            width = _static_width(model.get_submodule(site.module), site)
            if width is None:
                problem = (
                    f"its width is not known; give dims={{'{modality}': ...}} or an example of the model's arguments"
                )
        placements.append(Placement(modality, site, width, found, problem))
    return placements


def _seen(site: Site, module: nn.Module, record: Ran, repeats: str) -> tuple[int | None, str, str | None]:
    """Width, description and problem of the output that a site gave on the example."""
    if site.call is not None and site.call >= record.calls:
        return None, describe_output(record.output), f"runs {record.calls} times in one forward; calls count from 0"
    if record.calls > 1 and repeats == "error" and site.call is None:
        problem = f"runs {record.calls} times in one forward; repeats='all' counts the rows of every call"
        return None, describe_output(record.output), problem
    try:
        features = site.read(record.output)
        if features.dim() == 3 and site.feature_dim is None and _channels_first(module):
            problem = (
                f"gives {list(features.shape)}; say which dimension holds the features: Site(..., feature_dim=1) or -1"
            )
            return None, describe_output(features), problem
        return site.feature_rows(features).shape[-1], describe_output(features), None
    except InputError as error:
        return None, describe_output(record.output), str(error).removeprefix("apply_ebr: ")


def _channels_first(module: nn.Module) -> bool:
    """Whether the last layer in it that has a say puts features into dimension 1."""
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, (*_CHANNELS_FIRST, nn.Linear, nn.LayerNorm, nn.Flatten))
    ]
    return bool(layers) and isinstance(layers[-1], _CHANNELS_FIRST)


def _static_width(module: nn.Module, site: Site) -> int | None:
    if site.path or site.feature_dim not in (None, -1):
        return None
    while isinstance(module, nn.Sequential):
        layers = [layer for layer in module if not isinstance(layer, _KEEPS_WIDTH)]
        if not layers:
            return None
        module = layers[-1]
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None


def why_not(record: Ran | None, sites: Mapping[str, Site], ran: Mapping[str, Ran]) -> str:
    """Why a candidate has no head."""
    if record is None:
        return "not named in at"
    if record.calls == 0:
        return "does not run in the forward on example"
    last = max(ran[site.module].end for site in sites.values())
    if record.start > last:
        return "runs after the last site, on what the heads recover"
    return f"not named in at; gives {describe_output(record.output)}"
