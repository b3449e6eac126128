"""Figs. 1 and 2 of the DRL paper: are diverse gradients due to representations too alike?

    python examples/drl_similarity_figures.py --out runs/drl_similarity
    python examples/drl_similarity_figures.py --smoke        # seconds, no MNIST needed

Fig. 1: an MLP 784-100-100-2 for the digits {7, 9} and one for {0, 1}; cosine similarities of 100
test images, of all pairs: per-sample gradient against pixels and against representation (both
hidden layers and the logits). Fig. 2: similarities after Split MNIST with BER, without and with
DRL.

The paper states neither optimiser, epochs, batch nor training-set size. Here: Adam 1e-3, one epoch,
batch 64, all training images (Fig. 1); SGD 0.1, one epoch, batch 10, 1000 images per experience,
300 exemplars in all, lam 1e-3 (Fig. 2).

Measured with seeds 0 to 3 (record: examples/results/drl_similarity), the paper's value in brackets:
* Signs of all eight correlations hold in every seed, and pairs of different classes follow the
  representation more closely than the pixels: {7, 9} r = -.81 against -.49 (-.86, -.37), {0, 1}
  -.97 against -.31 (-.85, -.38).
* Pairs of one class: {0, 1} .48 against .35 (.79, .36). {7, 9} .70 against .70 (.71, .38): that the
  representation correlates more than the pixels, as the paper says of all cases, holds in two of
  four seeds there.
* {0, 1} is perfectly separable in two of four draws of 100 test images; in each of the other two a
  single image stands in the way. {7, 9} never is.
* {7, 9} is classified better than in the paper, 98.1 % (96.25 %); {0, 1} alike, 99.94 % (99.95 %).
* All four shifts of Fig. 2 hold in every seed. Fig. 2 has no published numbers.

Reference:
    Chen et al. (2020), Discriminative Representation Loss (DRL) for Continual Learning: A Solution
    for CLVision Challenge, Sec. 2, Figs. 1 and 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import Naive
from torch import Tensor
from torch.nn import functional as F

from avalanche_ext import MLP, BERPlugin, DRLPlugin
from avalanche_ext.benchmarks import split_digits, split_mnist
from avalanche_ext.benchmarks.mnist import load_mnist
from avalanche_ext.benchmarks.streams import Images, hold_out
from avalanche_ext.evaluation.metrics import SimilarityReport, similarity_report
from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import versions

GROUPS = ((7, 9), (0, 1))
KINDS = ("different", "same")
PUBLISHED_FIG1 = {
    "7,9": {
        "r_input_different": -0.37, "r_input_same": 0.38,
        "r_representation_different": -0.86, "r_representation_same": 0.71,
        "accuracy": 0.9625, "separable": False,
    },
    "0,1": {
        "r_input_different": -0.38, "r_input_same": 0.36,
        "r_representation_different": -0.85, "r_representation_same": 0.79,
        "accuracy": 0.9995, "separable": True,
    },
}  # fmt: skip
# Fig. 2 has no numbers; these are its text's words.
PUBLISHED_FIG2 = {
    "representation_different": "notably shifting towards a smaller region",
    "representation_same": "shift slightly towards a smaller region",
    "gradient_different": "more concentrated around 0",
    "gradient_same": "shifted towards 0",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every setting of both figures."""

    data: str = "MNIST"
    hidden: tuple[int, ...] = (100, 100)
    fig1_optimizer: str = "Adam"
    fig1_lr: float = 1e-3
    fig1_batch: int = 64
    fig1_epochs: int = 1
    fig1_samples: int = 100
    fig2_n_experiences: int = 5
    fig2_train_per_experience: int = 1000
    fig2_optimizer: str = "SGD"
    fig2_lr: float = 0.1
    fig2_batch: int = 10
    fig2_epochs: int = 1
    fig2_mem: int = 300
    fig2_mem_scope: str = "total"
    fig2_lam: float = 1e-3
    fig2_samples: int = 300


SMOKE = Protocol(
    data="digits of scikit-learn (smoke run, not the paper's data)",
    fig1_batch=8, fig1_samples=40, fig2_train_per_experience=60, fig2_mem=50, fig2_samples=60,
)  # fmt: skip

Streams = Callable[[int], Any]


def load_data(
    protocol: Protocol, root: str | None = None, download: bool = False
) -> tuple[Images, Images, Streams]:
    """Training images, test images, and the function from a seed to the stream of Fig. 2."""
    n, per = protocol.fig2_n_experiences, protocol.fig2_train_per_experience
    if protocol.data == "MNIST":
        train, test = load_mnist(root, download)
        return train, test, lambda seed: split_mnist(
            n, train_per_experience=per, seed=seed, root=root
        )  # fmt: skip
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16)[:, None]
    train, test = hold_out((x, torch.from_numpy(digits.target).long()))
    return train, test, lambda seed: split_digits(n, train_per_experience=per, seed=seed)


def draw(images: Images, n: int, seed: int) -> Images:
    """``n`` random samples."""
    chosen = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(seed))[:n]
    return images[0][chosen], images[1][chosen]


def accuracy(model: torch.nn.Module, images: Images) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images[0]).argmax(1) == images[1]).double().mean())


# Fig. 1 -------------------------------------------------------------------------------------


def two_digits(images: Images, group: tuple[int, int]) -> Images:
    """The images of two digits, labelled 0 and 1."""
    mine = torch.isin(images[1], torch.tensor(group))
    return images[0][mine], (images[1][mine] == group[1]).long()


def order(report: SimilarityReport) -> float:
    """How often a pair of one class is represented more alike than a pair of two classes."""
    different, same = report.representation
    below = torch.searchsorted(different.sort().values, same)
    return float(below.double().mean() / len(different))


def fig1_run(
    protocol: Protocol, train: Images, test: Images, group: tuple[int, int], seed: int
) -> tuple[SimilarityReport, dict[str, Any]]:
    """Train one binary classifier; its similarities and the values of the paper's Sec. 2."""
    x, y = two_digits(train, group)
    test = two_digits(test, group)
    torch.manual_seed(seed)
    model = MLP(x[0].numel(), protocol.hidden, 2)
    optimizer = torch.optim.Adam(model.parameters(), protocol.fig1_lr)
    for _ in range(protocol.fig1_epochs):
        for batch in torch.randperm(len(y)).split(protocol.fig1_batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    report = similarity_report(model, *draw(test, protocol.fig1_samples, seed))
    values = {name.removeprefix("Similarity_"): v for name, v in report.values().items()}
    values |= {"order": order(report), "separable": report.separable}
    values["accuracy"] = accuracy(model, test)
    return report, values


# Fig. 2 -------------------------------------------------------------------------------------


def fig2_run(
    protocol: Protocol, test: Images, stream: Any, lam: float, seed: int
) -> tuple[SimilarityReport, dict[str, Any]]:
    """Train on the stream with BER, and with DRL if ``lam`` is not 0; similarities afterwards."""
    RNGManager.set_random_seeds(seed)
    model = MLP(test[0][0].numel(), protocol.hidden, 10)
    plugins: list[Any] = [BERPlugin(protocol.fig2_mem, mem_scope=protocol.fig2_mem_scope)]
    if lam:
        plugins.append(DRLPlugin(lam))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), protocol.fig2_lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=protocol.fig2_batch,
        train_epochs=protocol.fig2_epochs,
        plugins=plugins,
        evaluator=None,
    )
    for experience in stream.train_stream:
        strategy.train(experience)
    report = similarity_report(model, *draw(test, protocol.fig2_samples, seed))
    values = {name.removeprefix("Similarity_"): v for name, v in report.values().items()}
    return report, values | {"accuracy": accuracy(model, test)}


# record -------------------------------------------------------------------------------------


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each value with its mean and sample standard deviation; a yes or no as a list."""
    return {
        name: [run[name] for run in runs]
        if isinstance(runs[0][name], bool)
        else aggregate([run[name] for run in runs])
        for name in runs[0]
        if all(name in run for run in runs)
    }


def fig1_statements(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[bool]]:
    """What the paper says about Fig. 1, seed by seed."""
    r = {f"{{{g}}}": rs for g, rs in runs.items()}
    out: dict[str, list[bool]] = {}
    for g, group in r.items():
        out[f"Fig. 1 {g}: r < 0 for different, r > 0 for same classes"] = [
            all(v[f"r_{w}_different"] < 0 < v[f"r_{w}_same"] for w in ("input", "representation"))
            for v in group
        ]
        for kind in KINDS:
            out[f"Fig. 1 {g}: representation correlates more than pixels, {kind}"] = [
                abs(v[f"r_representation_{kind}"]) > abs(v[f"r_input_{kind}"]) for v in group
            ]
    out["Fig. 1d {0,1}: representations separable"] = [v["separable"] for v in r["{0,1}"]]
    out["Fig. 1b {7,9}: representations not separable"] = [not v["separable"] for v in r["{7,9}"]]
    out["Fig. 1: {0,1} is classified better than {7,9}"] = [
        a["accuracy"] > b["accuracy"] for a, b in zip(r["{0,1}"], r["{7,9}"], strict=True)
    ]
    return out


def fig2_statements(
    without: list[dict[str, Any]], with_drl: list[dict[str, Any]]
) -> dict[str, list[bool]]:
    """What the paper says about Fig. 2, seed by seed."""
    pairs = list(zip(without, with_drl, strict=True))
    return {
        "Fig. 2a: s_h of different classes becomes smaller": [
            b["representation_different"] < a["representation_different"] for a, b in pairs
        ],
        "Fig. 2a: s_h of one class becomes smaller": [
            b["representation_same"] < a["representation_same"] for a, b in pairs
        ],
        "Fig. 2b: s_g of different classes concentrates around 0 (sd falls)": [
            b["sd_gradient_different"] < a["sd_gradient_different"] for a, b in pairs
        ],
        "Fig. 2b: s_g of one class moves towards 0": [
            abs(b["gradient_same"]) < abs(a["gradient_same"]) for a, b in pairs
        ],
    }


def in_words(seeds: list[bool]) -> str:
    if all(seeds):
        return "holds"
    return f"holds in {sum(seeds)} of {len(seeds)} seeds" if any(seeds) else "does not hold"


def measure(
    protocol: Protocol, seeds: Sequence[int], root: str | None = None, download: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both figures: the record, and the similarities to draw."""
    train, test, streams = load_data(protocol, root, download)
    drawn: dict[str, Any] = {"fig1": {}, "fig2": {"without": [], "with": []}}
    fig1: dict[str, list[dict[str, Any]]] = {}
    for group in GROUPS:
        name = ",".join(map(str, group))
        runs = [fig1_run(protocol, train, test, group, seed) for seed in seeds]
        fig1[name] = [values for _, values in runs]
        drawn["fig1"][name] = runs[0]
    fig2: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for seed in seeds:
        stream = streams(seed)
        for name, lam in (("without", 0.0), ("with", protocol.fig2_lam)):
            report, values = fig2_run(protocol, test, stream, lam, seed)
            drawn["fig2"][name].append(report)
            fig2[name].append(values)
    statements = fig1_statements(fig1) | fig2_statements(fig2["without"], fig2["with"])
    record = {
        "reference": "Chen et al. (2020), Discriminative Representation Loss (DRL) for Continual "
        "Learning: A Solution for CLVision Challenge, Sec. 2, Figs. 1 and 2",
        "not_stated_in_the_paper": "optimiser, epochs, batch size and training-set size of both "
        "figures; lam, memory and replay of Fig. 2",
        "protocol": asdict(protocol),
        "seeds": list(seeds),
        "fig1": {
            name: {"published": PUBLISHED_FIG1[name], "measured": over_seeds(runs)}
            for name, runs in fig1.items()
        },
        "fig2": {
            "published": PUBLISHED_FIG2,
            "measured": {
                "without_drl": over_seeds(fig2["without"]),
                "with_drl": over_seeds(fig2["with"]),
            },
        },
        "explained": {
            "fig1": "values of the drawn test images; accuracy on all test images of both digits",
            "r_*": "Pearson's r with the gradient's similarity, over pairs",
            "order": "probability that a pair of one class is represented more alike than a pair "
            "of two; 1 if and only if separable",
            "sd_*": "sample standard deviation over pairs; 'sd' of a value: over seeds",
        },
        "statements": {
            text: {"verdict": in_words(held), "per_seed": held} for text, held in statements.items()
        },
        "versions": versions(),
    }
    return record, drawn


def show(value: dict[str, Any], name: str) -> str:
    factor, form = {"accuracy": (100, ".2f"), "order": (1, ".4f")}.get(name, (1, "+.3f"))
    sd = "" if value["sd"] is None else f" ± {factor * value['sd']:{form.lstrip('+')}}"
    return f"{factor * value['mean']:{form}}{sd}"


def table(record: dict[str, Any]) -> str:
    """Published beside measured, then what holds."""
    lines = [f"Fig. 1, {record['protocol']['data']}, seeds {record['seeds']}"]
    lines.append(f"{'':32}{'published':>10}  {'measured':>16}")
    for group, part in record["fig1"].items():
        for name, published in (part["published"] | {"order": None}).items():
            measured = part["measured"][name]
            label = f"{{{group}}} {name.replace('_', ' ')}"
            label += " %" if name == "accuracy" else ""
            if published is None:
                lines.append(f"{label:32}{'':>10}  {show(measured, name):>16}")
            elif isinstance(published, bool):
                yes = f"{sum(measured)} of {len(measured)}"
                lines.append(f"{label:32}{'yes' if published else 'no':>10}  {yes:>16}")
            else:
                text = f"{100 * published:.2f}" if name == "accuracy" else f"{published:+.2f}"
                lines.append(f"{label:32}{text:>10}  {show(measured, name):>16}")
    measured = record["fig2"]["measured"]
    lines += ["", f"{'Fig. 2 (the paper has no numbers)':34}{'BER':>16}  {'BER + DRL':>16}"]
    for name, value in measured["without_drl"].items():
        if "input" not in name and not name.startswith("r_"):
            other = measured["with_drl"][name]
            label = name.replace("_", " ") + (" %" if name == "accuracy" else "")
            lines.append(f"{label:34}{show(value, name):>16}  {show(other, name):>16}")
    lines.append("")
    lines += [f"{text:68}{part['verdict']}" for text, part in record["statements"].items()]
    return "\n".join(lines)


# pictures -----------------------------------------------------------------------------------

COLOURS = {"different": "tab:blue", "same": "tab:orange"}


def signed(text: str) -> str:
    """With the minus sign that the axes have."""
    return text.replace("-", "\N{MINUS SIGN}")


def draw_fig1(drawn: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Four scatter plots: gradient similarity against pixels' and representations'."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(9, 8.6), sharex=True, sharey="col", layout="constrained"
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    letters = iter("abcd")
    for row, (group, (report, values)) in zip(axes, drawn.items(), strict=True):
        for axis, what, label in zip(
            row, ("input", "representation"), ("pixels", "representations"), strict=True
        ):
            published = PUBLISHED_FIG1[group]
            for kind in KINDS:
                name = f"r_{what}_{kind}"
                r = signed(f"r = {values[name]:+.2f} (paper {published[name]:+.2f})")
                axis.scatter(
                    getattr(report.gradient, kind), getattr(getattr(report, what), kind),
                    s=5, alpha=0.3, linewidths=0, color=COLOURS[kind],
                    label=f"{kind} class{'es' if kind == 'different' else ''}: {r}",
                )  # fmt: skip
            legend = axis.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, markerscale=3,
                title=f"({next(letters)}) {{{group}}}, {label}", borderaxespad=0.2,
            )  # fmt: skip
            for handle in legend.legend_handles:
                handle.set_alpha(1)
            axis.set_ylabel(f"cosine similarity of {label}")
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xticks([-1, -0.5, 0, 0.5, 1])
        axis.set_xlabel("cosine similarity of gradients")
    n, data = record["protocol"]["fig1_samples"], record["protocol"]["data"]
    figure.suptitle(f"All pairs of {n} test images, {data}, seed {record['seeds'][0]}")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_fig2(drawn: dict[str, list[SimilarityReport]], record: dict[str, Any], path: Path) -> None:
    """Histograms of the similarities of representations and gradients, with and without DRL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    lam = record["protocol"]["fig2_lam"]
    for row, what, symbol in zip(
        axes, ("representation", "gradient"), ("s_h", "s_g"), strict=True
    ):  # fmt: skip
        for axis, kind in zip(row, KINDS, strict=True):
            for name, label, colour in (
                ("without", "BER", "tab:gray"),
                ("with", f"BER + DRL, $\\lambda$ = {lam:g}", "tab:red"),
            ):
                pairs: Tensor = torch.cat([getattr(getattr(r, what), kind) for r in drawn[name]])
                bins = {"bins": 80, "range": (-1, 1), "density": True, "color": colour}
                text = f"{label}: mean {signed(f'{pairs.mean():+.2f}')}, sd {pairs.std():.2f}"
                axis.hist(pairs.numpy(), histtype="stepfilled", alpha=0.3, label=text, **bins)
                axis.hist(pairs.numpy(), histtype="step", linewidth=1.2, **bins)
            axis.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, borderaxespad=0.2,
                title=f"${symbol}$, {kind} class{'es' if kind == 'different' else ''}",
            )  # fmt: skip
            axis.set_xticks([-1, -0.5, 0, 0.5, 1])
            axis.set_xlabel(f"cosine similarity of {what}s")
            axis.set_ylabel("density")
            axis.grid(alpha=0.25)
    n, data = record["protocol"]["fig2_samples"], record["protocol"]["data"]
    seeds = ", ".join(map(str, record["seeds"]))
    figure.suptitle(f"After split {data}: all pairs of {n} test images, pooled over seeds {seeds}")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/drl_similarity"))
    parser.add_argument("--root", help="folder of MNIST/raw; default ~/.avalanche/data[/mnist]")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is absent")
    parser.add_argument("--smoke", action="store_true", help="scikit-learn's digits, one seed")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seeds = options.seeds[:1]
    import matplotlib as mpl

    mpl.use("Agg")
    protocol = SMOKE if options.smoke else Protocol()
    try:
        record, drawn = measure(protocol, options.seeds, options.root, options.download)
    except FileNotFoundError as error:
        parser.exit(2, f"{error} Or try --smoke, which needs no download.\n")
    options.out.mkdir(parents=True, exist_ok=True)
    draw_fig1(drawn["fig1"], record, options.out / "fig1.png")
    draw_fig2(drawn["fig2"], record, options.out / "fig2.png")
    path = options.out / "similarity.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(record))
    print(path)


if __name__ == "__main__":
    main()
