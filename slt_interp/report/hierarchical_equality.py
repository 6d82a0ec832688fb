"""The report of the study `hierarchical-equality`: its sentences and figures, all computed from the run directory."""

from typing import Any

import numpy as np

from slt_interp.curvature.gaussian import gaussian_llc
from slt_interp.estimators.llc import OK
from slt_interp.report import circuit_search, figures
from slt_interp.report.basin_volume import volume_section, volume_sentences
from slt_interp.report.dial_comparison import degradation_section, survival_sentence
from slt_interp.report.page import Page, Section
from slt_interp.report.words import number, show
from slt_interp.storage import RunDirectory

Results = dict[str, Any]

SYMBOLS = (
    ("L, L*", "mean loss over the n fixed examples, in nats per example; L* is its value at the center"),
    ("center, w*", "the trained and polished weights"),
    ("nβ", "number of examples n times the inverse temperature β of the posterior"),
    ("γ", "localization: the posterior carries the prior N(w*, 1/γ) on every weight"),
    ("tempered posterior", "p(w) ∝ exp(−nβ (L(w) − L*) − γ |w − w*|² / 2)"),
    ("LLC", "local learning coefficient, estimated as nβ E[L − L*] under the tempered posterior; dimensionless"),
    ("SGLD", "stochastic gradient Langevin dynamics, the sampler"),
    ("ESS, R-hat", "effective number of independent draws; agreement of chains (1 is perfect)"),
    ("virial ratio", "E[(w − w*) · ∇U] / d, with U = −ln p and d the number of weights: 1 if the chains are in equilibrium"),
    ("IIA", "interchange intervention accuracy: how often the network answers as the causal model does after a patch"),
    (
        "dial, level",
        "a way to damage the network, and how far it is turned: nβ for the posterior, a standard deviation for noise, a share for pruning and low rank, a step for checkpoints and quantization",
    ),
    ("excess loss", "mean of L − L* over the damaged networks, in nats per example"),
    ("layer1, ...", "the hidden layers, after their ReLU"),
    (
        "alignment",
        "a rotation of a layer's activations, and the 8 directions each that are claimed to carry (a = b) and (c = d)",
    ),
    ("V(ε)", "share of N(w*, 1/γ) whose loss is at most L* + ε: the volume of the basin"),
    ("rank", "number of Hessian eigenvalues above a threshold"),
)


def page(run: RunDirectory) -> Page:
    """Compose the report."""
    results = run.results
    sections = (
        _training(results, run),
        _llc(results, run),
        _against_hessian(results, run),
        _spectrum(results, run),
        volume_section(results, run),
        degradation_section(results),
        *circuit_search.sections(results),
    )
    return Page(
        title="Hierarchical equality: the basin of a trained network, and a circuit in it",
        findings=findings(results),
        sections=sections,
        symbols=SYMBOLS + circuit_search.SYMBOLS,
    )


def findings(results: Results) -> tuple[str, ...]:
    """Answer the study's questions, one sentence each."""
    estimate, spectrum = results["llc"], results["spectrum"]
    answers = [
        f"The polished network answers {results['polish']['test_accuracy']:.3%} of fresh examples right.",
        f"Its LLC is {estimate['llc']:.1f} ± {estimate['std_error']:.1f} at nβ = {estimate['nbeta']:.0f} and γ = "
        f"{estimate['localization']:g} ({_status(estimate)}), {_compare(estimate, spectrum)}.",
        _rank_sentence(spectrum),
    ]
    answers += volume_sentences(results)[:1]
    answers += [survival_sentence(results, site) for site in results["alignment"]["sites"]]
    return (*answers, *circuit_search.findings(results))


def _training(results: Results, run: RunDirectory) -> Section:
    training, polish = results["training"], results["polish"]
    arrays = run.arrays("training")
    floor = training["floor"]
    figure = figures.training_curve(
        arrays["steps"],
        (arrays["test_loss"] - floor, arrays["test_loss_std_error"]),
        (1 - arrays["test_accuracy"], arrays["test_accuracy_std_error"]),
        arrays["train_loss"] - floor,
    )
    drop = polish["grad_norm_before"] / polish["grad_norm_after"]
    sentences = (
        f"After {training['num_examples_seen']:,} fresh examples the loss is {training['excess_loss']:.2g} nats above its "
        f"floor of {floor:.4f} nats (the entropy of the smoothed labels), and {training['accuracy']:.4%} of "
        f"{training['num_test']:,} fresh examples are answered right.",
        f"Polishing on the fixed examples moved the weights by {polish['distance']:.2g} (their norm is {polish['norm']:.3g}), "
        f"lowered the loss above the floor from {polish['excess_before']:.2g} to {polish['excess_after']:.2g} nats and the gradient "
        f"norm from {polish['grad_norm_before']:.2g} to {polish['grad_norm_after']:.2g}, {drop:.3g} times less.",
        "Bars are two standard errors over the fresh examples; the minibatch curve shows its own scatter.",
    )
    return Section("Training and polishing", sentences, figure)


def _llc(results: Results, run: RunDirectory) -> Section:
    estimate, spectrum = results["llc"], results["spectrum"]
    diagnostics = estimate["diagnostics"]
    arrays = run.arrays("llc")
    energy = estimate["nbeta"] * (arrays["loss"].astype(np.float64) - estimate["init_loss"])
    figure = figures.chain_traces(
        energy,
        arrays["squared_distance"],
        estimate["num_burnin"],
        estimate["thinning"],
        number(spectrum["gaussian_llc"]),
    )
    sentences = (
        f"{diagnostics['num_chains_used']} of {diagnostics['num_chains']} chains agree on an LLC of {estimate['llc']:.2f} ± "
        f"{estimate['std_error']:.2f} (ESS {show(estimate['ess'], '.0f')}, R-hat {show(estimate['rhat'], '.3f')}): {_status(estimate)}."
        if estimate["status"] == OK
        else f"{diagnostics['num_chains_used']} of {diagnostics['num_chains']} chains give an LLC of {estimate['llc']:.2f} ± "
        f"{estimate['std_error']:.2f} (ESS {show(estimate['ess'], '.0f')}, R-hat {show(estimate['rhat'], '.3f')}), with the verdict: "
        f"{estimate['status']}.",
        *(f"Warning: {warning}." for warning in estimate["warnings"]),
        f"The virial ratio is {diagnostics['virial']:.3f} ± {diagnostics['virial_std_error']:.3f}, {diagnostics['virial_loss']:.3f} of it "
        f"from the loss and {diagnostics['virial_localization']:.3f} from the localization.",
        f"Draws lie {diagnostics['rms_distance']:.2g} from the center (root mean square), {diagnostics['rms_distance'] / estimate['norm']:.0%} "
        "of the norm of the weights.",
        f"On the quadratic that the Hessian describes, the step size of {estimate['step_size']:.2g} would add "
        f"{show(estimate['gaussian_step_bias'], '.2f')} to the estimate.",
        f"L* = {estimate['init_loss']:.7f} nats, over all examples: the same ones enter both terms of L − L*, so its sampling error, "
        f"{show(estimate['init_loss_sampling_error'], '.1g')} nats, is no part of the LLC's.",
    )
    return Section("The local learning coefficient by SGLD", sentences, figure)


def _against_hessian(results: Results, run: RunDirectory) -> Section:
    estimate, spectrum, levels = results["llc"], results["spectrum"], results["degradation"]["levels"]
    values = run.arrays("spectrum")["ritz_values"][0]
    estimates = sorted([estimate, *(level["estimate"] for level in levels)], key=lambda e: e["nbeta"])
    nbetas = np.array([e["nbeta"] for e in estimates])
    grid = np.geomspace(nbetas.min() / 1.5, nbetas.max() * 1.5, 60)
    curve = np.array([gaussian_llc(values, np.ones_like(values), n, estimate["localization"]) for n in grid])
    ranks = [entry["rank"] for entry in spectrum["rank_at"]]
    figure = figures.llc_against_hessian(
        nbetas,
        np.array([e["llc"] for e in estimates]),
        np.array([number(e["std_error"]) for e in estimates]),
        [e["status"] == OK for e in estimates],
        (grid, curve),
        (min(ranks), max(ranks)),
        spectrum["dimension"],
    )
    ratios = [
        (e["llc"] / float(gaussian_llc(values, np.ones_like(values), e["nbeta"], e["localization"])), e["nbeta"])
        for e in estimates
    ]
    low, high = min(ratios), max(ratios)
    span = f"between {low[0]:.2f} (at nβ = {low[1]:.0f}) and {high[0]:.2f} times (at nβ = {high[1]:.0f}) what the Hessian at w* predicts"
    full = f"The full-batch run at nβ = {estimate['nbeta']:.0f} is {_compare(estimate, spectrum)}."
    sentences = (
        f"Over nβ from {nbetas.min():.0f} to {nbetas.max():.0f}, the sampled LLC is {span} for the same nβ and γ."
        if np.isfinite(curve).all()
        else "At some nβ the Hessian predicts nothing: it has curvatures below −γ / nβ.",
        full,
        f"The other values come from the chains of section 6, on minibatches, with steps chosen to add {run.config['settings']['dial_tolerance']:.0%} "
        "to the energy before minibatch noise; their bars show neither, the virial ratio does.",
        _rank_sentence(spectrum),
    )
    table = (
        ("nβ", "LLC (SGLD)", "Gaussian", "virial ratio", "verdict"),
        *(
            (
                f"{e['nbeta']:.0f}",
                f"{e['llc']:.2f} ± {show(e['std_error'], '.2f')}",
                f"{float(gaussian_llc(values, np.ones_like(values), e['nbeta'], e['localization'])):.2f}",
                f"{e['diagnostics']['virial']:.3f}",
                "; ".join([e["status"], *e["warnings"]]),
            )
            for e in estimates
        ),
    )
    return Section("LLC against Hessian", sentences, figure, table)


def _spectrum(results: Results, run: RunDirectory) -> Section:
    spectrum, estimate = results["spectrum"], results["llc"]
    resolved = estimate["localization"] / spectrum["nbeta"]
    # The matrix is of float64, and what it says of these weights is finer than their own rounding.
    rounding = float(np.finfo(np.float64).eps) * spectrum["dimension"] * spectrum["largest"]
    figure = figures.eigenvalues(run.arrays("spectrum")["ritz_values"][0], resolved, rounding)
    sentences = (
        f"Of {spectrum['dimension']} directions, {spectrum['num_held']} are curved enough (above γ / nβ = {resolved:.2g}) that the loss, not "
        "the localization, holds them.",
        f"Eigenvalues run from {spectrum['smallest']:.2g} to {spectrum['largest']:.3g}; their sum is {spectrum['trace']:.4g}.",
        *(f"Warning: {warning}." for warning in spectrum["warnings"]),
        "They come from the whole matrix in double precision, and carry no sampling error for these examples.",
    )
    table = (
        ("threshold", "eigenvalues above it", "half of that"),
        *((f"{entry['threshold']:g}", f"{entry['rank']:.0f}", f"{entry['rank'] / 2:.1f}") for entry in spectrum["rank_at"]),
    )
    return Section("Eigenvalues of the Hessian", sentences, figure, table)


def _compare(estimate: Results, spectrum: Results) -> str:
    predicted = number(spectrum["gaussian_llc"])
    if not np.isfinite(predicted):
        return "and the Hessian predicts none: it has curvatures below −γ / nβ"
    gap = estimate["llc"] - predicted
    side = "above" if gap > 0 else "below"
    return (
        f"{abs(gap) / abs(predicted):.0%} {side} the {predicted:.1f} that the Hessian predicts at the same nβ and γ (a gap of {abs(gap):.1f} ± "
        f"{estimate['std_error']:.1f}; SGLD's step size is predicted to add {show(estimate['gaussian_step_bias'], '.1f')} to the LLC)"
    )


def _rank_sentence(spectrum: Results) -> str:
    by_threshold = {entry["threshold"]: entry["rank"] for entry in spectrum["rank_at"]}
    low, high = max(by_threshold), min(by_threshold)
    return (
        f"Counts of directions: rank / 2 is {by_threshold[low] / 2:.1f} or {by_threshold[high] / 2:.1f} as eigenvalues count from {low:g} or "
        f"from {high:g} on, and d / 2 is {spectrum['dimension'] / 2:.0f}."
    )


def _status(estimate: Results) -> str:
    return "no warning" if estimate["status"] == OK else estimate["status"]
