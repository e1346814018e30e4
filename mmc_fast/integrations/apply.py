"""``apply_ebr``: heads behind named submodules of any model, without touching its source."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError
from mmc_fast.functional import check_reversal
from mmc_fast.nn import EBRHead

from . import store
from .collect import SiteHead
from .handle import EBRHandle, find_handles
from .plan import candidates, find_sites, place, unknown_module, why_not
from .report import ApplyReport
from .site import Site, is_compiled
from .trace import trace

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def apply_ebr(
    model: nn.Module,
    at: Mapping[str, str | Site],
    *,
    latent_dim: int = 512,
    hidden_dim: int = 1024,
    psi_dims: Sequence[int] = (512, 256),
    residual: bool = False,
    normalize: bool = False,
    reversal: float | Tensor = 1.0,
    dims: Mapping[str, int] | None = None,
    example: Any = None,
    repeats: str = "error",
    name: str = "ebr",
    seed: int | None = None,
    dry_run: bool = False,
    fusion: str | None = None,
    one_call: bool = True,
    backend: str = "auto",
) -> EBRHandle:
    r"""Put one :class:`mmc_fast.nn.EBRHead` over the outputs of named submodules; the model then sees what it recovers.

    In every forward, the output ``z_i`` of the i-th named submodule is replaced by
    ``r_i = decoder_i(encoder_i(z_i))``; ``L_md`` over all latents is ready after the forward::

        handle = apply_ebr(model, at={"image": "encoders.image", "text": "encoders.text"}, example=batch)
        loss = criterion(model(*batch), y) + handle.losses().discrimination

    Args:
        model: any module, before it is compiled or wrapped for several devices.
        at: modality (a word without dots) -> dotted name of the submodule that gives its features, or a :class:`Site` for one tensor of
            several, another feature dimension or sequence-first layout. At least ``[rows, d_i]``; every dimension but
            the first (samples) and the last (features) is a dimension of rows.
        latent_dim, hidden_dim, psi_dims, residual, normalize: see :class:`mmc_fast.nn.EBRHead`.
        reversal: λ, finite and not negative; change it later through ``handle.reversal`` (a 0-d tensor under
            ``torch.compile``).
        dims: modality -> width of its features. Needed where neither the submodule (a linear layer, or a sequence
            that ends in one) nor ``example`` tells.
        example: arguments of one forward (a tensor, a tuple, or a dict of keywords), run without gradients in
            evaluation mode. Training flags, buffers and random generators are put back.
        repeats: "error" if a site may run only once in a forward, "all" to count the rows of every call.
        name: name of the new submodule; its parameters enter ``model.parameters()`` and the state dict under it.
        seed: initialises the heads from this seed and leaves the global generator alone; None draws from it.
        dry_run: change nothing, and report what would be done, problems included.
        fusion: name of the module that first reads all features. The heads then run in one call at its input at the
            latest, and a read of features before all sites ran is refused. None: found in each forward, by who reads first.
        one_call: False runs each head at its site, for models whose fusion cannot take features that are still to come.
        backend: see :func:`mmc_fast.functional.ebr_step`.

    Returns:
        :class:`EBRHandle`: report (``str(handle)``), ``losses()``, ``explain()``, ``present(mask)``, ``adversarial()``,
        ``save(path)``, ``restore()``.

    Raises:
        InputError: no or unknown names, nested or repeated modules, widths unknown or contradictory, a site that does
            not run on ``example``, a λ that is none. Nothing is changed then.
        TypeError: ``model`` is no module, or wrapped already.

    Source: Chaudhuri et al., ICML 2025, section 3.3.

    Examples:
        >>> model = nn.ModuleDict({"image": nn.Linear(20, 16), "text": nn.Linear(12, 16)})
        >>> handle = mmc_fast.apply_ebr(model, {"image": "image", "text": "text"}, latent_dim=8, hidden_dim=16, psi_dims=(8,))
        >>> list(handle.head.dims), sorted(handle.sites)
        ([16, 16], ['image', 'text'])
    """
    _check_model(model)
    sites = find_sites(model, at)
    if repeats not in ("error", "all"):
        raise InputError(f"apply_ebr: repeats is {repeats!r}; allowed are 'error' and 'all'")
    _check_free(model, name)
    check_reversal(reversal, "apply_ebr")
    if fusion is not None:
        _check_fusion(model, fusion, sites, one_call and repeats == "error")
    if repeats == "all" and len(sites) == 1 and not dry_run:
        warnings.warn(
            f"apply_ebr: with {next(iter(sites))} alone there is nothing to tell apart and L_md is 0; if its module serves "
            "several modalities, name its calls: Site(..., call=0), Site(..., call=1)",
            stacklevel=2,
        )
    others = candidates(model, sites)
    ran = {} if example is None else trace(model, example, [s.module for s in sites.values()] + others)
    placements = place(model, sites, dims or {}, ran, repeats)
    problems = [p for p in placements if p.problem]
    if problems and not dry_run:
        raise InputError(f"apply_ebr: {problems[0].modality} at {problems[0].site}: {problems[0].problem}")
    report = ApplyReport(
        model=type(model).__name__,
        status="dry run",
        name=name,
        placements=tuple(placements),
        elsewhere=tuple((other, why_not(ran.get(other), sites, ran)) for other in others),
        hidden_dim=hidden_dim,
        latent_dim=latent_dim,
        psi_dims=tuple(psi_dims),
        parameters=0,
    )
    if problems:
        return EBRHandle(model, sites, report, reversal)
    widths = {p.modality: p.width for p in placements if p.width is not None}
    head = _build_head(
        widths, seed, dry_run, latent_dim=latent_dim, hidden_dim=hidden_dim, psi_dims=psi_dims,
        residual=residual, normalize=normalize, backend=backend,
    )  # fmt: skip
    head.sites = [site.told() for site in sites.values()]
    head.applied = {"repeats": repeats, "fusion": fusion, "one_call": one_call}
    report = dataclasses.replace(
        report, parameters=sum(p.numel() for p in head.parameters()), status="dry run" if dry_run else "applied"
    )
    handle = EBRHandle(model, sites, report, reversal)
    if not dry_run:
        _move(head, model, sites)
        handle._attach(head.train(model.training), repeats, fusion, one_call)
    return handle


def load_ebr(
    model: nn.Module, path: str | Path | Mapping[str, Any], *, reversal: float | Tensor = 1.0, name: str | None = None
) -> EBRHandle:
    """Heads from a file on a model: their sites, sizes and options, then their weights.

    Args:
        model: without heads, or with the same ones. Its own weights are not touched.
        path: a file of ``handle.save``; or a checkpoint of a whole model with heads: safetensors, ``torch.save``, Lightning,
            the folder of ``save_pretrained``; or a state dict.
        reversal: λ for further training.
        name: of the heads, where the file holds several.

    Raises:
        InputError: no heads there, or heads whose sites, order, widths or options do not fit ``model``.

    Examples:
        >>> sizes = {"latent_dim": 8, "hidden_dim": 16, "psi_dims": (8,)}
        >>> handle = mmc_fast.apply_ebr(nn.ModuleDict({"image": nn.Linear(20, 16)}), {"image": "image"}, **sizes)
        >>> handle.save("heads.safetensors")
        >>> again = mmc_fast.load_ebr(nn.ModuleDict({"image": nn.Linear(20, 16)}), "heads.safetensors")
        >>> torch.equal(again.head.encoders["image"][0].weight, handle.head.encoders["image"][0].weight)
        True
    """
    state = path if isinstance(path, Mapping) else store.read(Path(path))
    where = "the state dict" if isinstance(path, Mapping) else str(path)
    prefix, options, tensors = store.find(state, where, name)
    if not options.get("sites"):
        raise InputError(
            f"load_ebr: the heads in {where} are an EBRHead's and know no sites; call apply_ebr and load them there"
        )
    holder, its = store.owner(model, prefix)
    handles = [h for h in find_handles(holder) if h.model is holder and h.report.name == its]
    if handles:
        handle = handles[0]
    else:
        at = {m: Site(**site) for m, site in zip(options["modalities"], options["sites"], strict=True)}
        sizes = {key: options[key] for key in ("latent_dim", "hidden_dim", "psi_dims", "residual", "normalize")}
        widths = dict(zip(at, options["dims"], strict=True))
        handle = apply_ebr(holder, at, dims=widths, reversal=reversal, name=its, **sizes, **options["apply"])
    handle._alive()[0].load_state_dict(tensors)
    return handle


def _check_fusion(model: nn.Module, fusion: str, sites: Mapping[str, Site], possible: bool) -> None:
    if not possible:
        raise InputError(
            "apply_ebr: fusion asks for one call of all heads; leave out one_call=False and repeats='all', or fusion"
        )
    names = [name for name, _ in model.named_modules() if name]
    if fusion not in names:
        raise unknown_module(fusion, names)
    for modality, site in sites.items():
        if f"{site.module}.".startswith(f"{fusion}.") or f"{fusion}.".startswith(f"{site.module}."):
            raise InputError(
                f"apply_ebr: fusion {fusion!r} and the site of {modality!r} ({site}) contain each other; name the module after the sites"
            )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_ebr: model is {type(model).__name__}; give an nn.Module")
    if is_compiled(model) or isinstance(model, _WRAPPERS):
        raise TypeError(
            f"apply_ebr: model is {type(model).__name__}, compiled or wrapped already; apply to the plain module, "
            "then compile or wrap it"
        )


def _check_free(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(f"apply_ebr: name is {name!r}; give a word without dots, such as 'ebr'")
    if isinstance(getattr(model, name, None), EBRHead):
        raise InputError(f"apply_ebr: the model has a head named '{name}' already; restore() it or choose another name")
    if hasattr(model, name):
        raise InputError(f"apply_ebr: the model has an attribute '{name}' already; choose another name=")


def _build_head(widths: Mapping[str, int], seed: int | None, dry_run: bool, **sizes: Any) -> SiteHead:
    """The head on the CPU; on no device, and without a random draw, where only its size is asked for."""
    if dry_run:
        with torch.device("meta"):
            return _head(widths, **sizes)
    with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(check_seed(seed))
        return _head(widths, **sizes)


def _head(widths: Mapping[str, int], **sizes: Any) -> SiteHead:
    try:
        return SiteHead(dict(widths), **sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"apply_ebr: {error}") from error


def _move(head: EBRHead, model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Each pair of heads to the device and dtype of its site; the discriminator to those of the first."""
    modules = [model.get_submodule(site.module) for site in sites.values()]
    places = [_place(module, model) for module in modules]
    for encoder, decoder, (device, dtype) in zip(head.encoders, head.decoders, places, strict=True):
        encoder.to(device=device, dtype=dtype)
        decoder.to(device=device, dtype=dtype)
    head.discriminator.to(device=places[0][0], dtype=places[0][1])


def _place(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for p in (*module.parameters(), *model.parameters()):
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.get_default_dtype()
