"""Fill README's tables from the records in ``examples/results``; the tests compare the two.

python examples/update_readme.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from avalanche_ext.catalog import find_card
from avalanche_ext.evaluation.tables import as_markdown
from avalanche_ext.experiments.report import table_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"


def filled(text: str) -> str:
    """README's text with every marked block made anew from its record."""

    def block(match: re.Match[str]) -> str:
        kind, _, name = match["what"].partition(": ")
        maker = {
            "table": table, "sign": sign, "similarity": similarity, "speed": speed,
            "importance": importance, "speed of methods": speed_of_methods, "bridges": bridges,
            "equal bytes": equal_bytes, "beside avalanche": beside_avalanche,
        }[kind]  # fmt: skip
        return f"<!-- {match['what']} -->\n{maker(name)}\n<!-- end -->"

    return re.sub(r"<!-- (?P<what>[^>]+?) -->\n(.*?)<!-- end -->", block, text, flags=re.DOTALL)


def table(name: str) -> str:
    """A table of results; times only where the machine had nothing else to do."""
    rows = table_rows(RESULTS / name)
    if name.startswith("toy_core50"):
        hidden = {"seconds", "average_accuracy", "average_incremental_accuracy", "forgetting",
                  "bytes_remembered"}  # fmt: skip
        rows = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
    elif name.startswith("latent_toy"):
        shown = ("title", "seeds", "test_accuracy", "bytes_remembered", "samples_trained")
        rows = [{k: v for k, v in row.items() if k in shown} for row in rows]
    elif name != "split_digits":
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return as_markdown(rows)


def similarity(_: str) -> str:
    """Correlations of Fig. 1 and shifts of Fig. 2, published beside measured."""
    record = json.loads((RESULTS / "drl_similarity" / "similarity.json").read_text("utf-8"))
    lines = []
    for digits, group in record["fig1"].items():
        for name in ("r_input_different", "r_input_same", "r_representation_different",
                     "r_representation_same", "accuracy"):  # fmt: skip
            value = group["measured"][name]
            measured = f"{value['mean']:.2f} ± {value['sd']:.2f}"
            if name == "accuracy":
                measured = f"{value['mean']:.4f} ± {value['sd']:.4f}"
            lines.append(
                [f"Fig. 1 {{{digits}}}: {_NAMES[name]}", str(group["published"][name]), measured]
            )
    before, after = (record["fig2"]["measured"][k] for k in ("without_drl", "with_drl"))
    for name, label, published in _SHIFTS:
        lines.append(
            [
                f"Fig. 2: {label}",
                published,
                f"{before[name]['mean']:.3f} → {after[name]['mean']:.3f}",
            ]
        )
    head = ["quantity", "paper", f"measured ({len(record['seeds'])} seeds)"]
    failed = [f"{name}: {s['verdict']}" for name, s in record["statements"].items()
              if s["verdict"] != "holds"]  # fmt: skip
    return (
        _rows(head, lines)
        + f"\n\nOf the paper's {len(record['statements'])} statements about the two figures all "
        f"hold in every seed, except: {'; '.join(failed)}. The paper states neither optimiser nor "
        f"epochs of these figures; here Adam, one epoch, and the small protocol below."
    )


_NAMES = {
    "r_input_different": "r of gradients and pixels, different classes",
    "r_input_same": "r of gradients and pixels, one class",
    "r_representation_different": "r of gradients and representations, different classes",
    "r_representation_same": "r of gradients and representations, one class",
    "accuracy": "test accuracy",
}
_SHIFTS = (
    ("representation_different", "s_h of different classes, BER → DRL+BER", "notably smaller"),
    ("representation_same", "s_h of one class", "slightly smaller"),
    ("sd_gradient_different", "spread of s_g of different classes", "closer to 0"),
    ("gradient_same", "s_g of one class", "towards 0"),
)


def sign(_: str) -> str:
    """When the printed sign diverges, and what either sign does for BER."""
    record = json.loads((RESULTS / "drl_sign" / "sign.json").read_text("utf-8"))
    cells = {(r["form"], r["lr"], r["lam"]): r["steps"] for r in record["divergence"]}
    settings = list(dict.fromkeys((lr, lam) for _, lr, lam in cells))
    steps = _rows(
        ["steps until no longer finite, first two digits of MNIST", '`form="eq3"`', '`form="drl"`'],
        [
            [f"lr {lr:g}, lam {lam:g}"]
            + [str(cells[form, lr, lam] or "finite throughout") for form in ("eq3", "drl")]
            for lr, lam in settings
        ],
    )
    accuracy = _rows(
        ["accuracy %, small Split MNIST", f"{record['accuracy'][0]['seeds']} seeds"],
        [
            [
                f'BER + `form="{r["form"]}"`, lam {r["lam"]:g}' if r["lam"] else "BER",
                f"{100 * r['average_accuracy']['mean']:.1f} ± "
                f"{100 * r['average_accuracy']['sd']:.1f}",
            ]
            for r in record["accuracy"]
        ],
    )
    return f"{steps}\n\n{accuracy}"


def importance(_: str) -> str:
    """What differs from Avalanche's importance methods."""
    record = json.loads(
        (RESULTS / "importance_methods" / "importance_methods.json").read_text("utf-8")
    )
    lines = [
        [
            f"EWC: trace of the Fisher information, measured in batches of {batch}",
            *(f"{record['fisher'][who][batch]:.4f}" for who in ("avalanche", "here")),
        ]
        for batch in record["fisher"]["here"]
    ]
    si, moved, modes = (record[k] for k in ("si", "batch_statistics", "train_mode"))
    lines += [
        ["SI on a CPU: largest distance of a weight from plain training (Avalanche's at lam 1e6)",
         f"{si['avalanche']:.3f}", f"{si['here']:.3f}"],
        ["MAS: largest move of a batch norm's running mean while it measures",
         f"{moved['avalanche']:.3f}", f"{moved['here']:.3f}"],
        ["RWalk: share of training's forward passes in train mode",
         f"{100 * modes['avalanche']:.0f} %", f"{100 * modes['here']:.0f} %"],
    ]  # fmt: skip
    return _rows(["Split digits", "Avalanche 0.6.0", "here"], lines)


def bridges(_: str) -> str:
    """Accuracy behind bridges, for embedders trained in a row and apart."""
    record = json.loads((RESULTS / "alignment_figure" / "alignment.json").read_text("utf-8"))
    modes = list(record["modes"])
    body = []
    for name in record["modes"][modes[0]]:
        cells = []
        for mode in modes:
            values = [statistics.fmean(a) for a in record["modes"][mode][name]["accuracy"]]
            cells.append(f"{100 * statistics.fmean(values):.1f} ± "
                         f"{100 * statistics.stdev(values):.1f}")  # fmt: skip
        body.append([name, *cells])
    return _rows(["bridges", *(f"trained {mode}, accuracy %" for mode in modes)], body)


def equal_bytes(_: str) -> str:
    """Memories that make their samples, and as how many bytes of exemplars they are good."""
    record = json.loads((RESULTS / "memory_figure" / "memory.json").read_text("utf-8"))
    body = []
    for name, points in record["curves"].items():
        for point in points:
            key = f"{name} at {point['bytes']} bytes"
            if key not in record["equal_bytes_of_ber"]:
                continue
            bytes_ = record["equal_bytes_of_ber"][key]
            accuracy = point["accuracy"]
            settings = point["settings"]
            which = settings.get("generator_widths") or settings.get("memory")
            which = None if len(points) == 1 else which
            body.append([
                f"{name}, {which}" if which else name, f"{point['bytes']:,}",
                f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}",
                f"{bytes_:,.0f}" if bytes_ else "more than were tried",
            ])  # fmt: skip
    return _rows(["memory", "bytes", "accuracy %", "bytes of BER's exemplars"], body)


def speed(_: str) -> str:
    """The ratios of the benchmarks of speed."""
    loss, loading, stream = (_perf(n) for n in ("drl_loss", "replay_loading", "long_stream"))
    return "\n\n".join(
        [
            "A training step over a hand-written loop that does the same mathematics on the same "
            "tensors, from the same weights to the same weights (to 1e-6), in the second "
            "experience:",
            _step_time([*_perf("step_time_mlp")["rows"], *_perf("step_time_resnet18")["rows"]]),
            "Avalanche's column for BER is its `ReplayPlugin` with as many replayed samples per "
            "step; for DRL+BER, with `DRLPlugin` on top. ResNet-18 takes seconds per step on this "
            "processor, so what is around the model disappears in the spread of the measurement "
            "(medians of three rounds of two to four steps).",
            "How a step's time and the memory's size grow with the experiences, the exemplars and "
            "the classes:",
            "![step time and memory](examples/results/perf/growth.png)",
            "DRL loss, forward and backward, over one read of the activations forward and one read "
            "and one write backward:",
            _rows(
                ["B", "D", "class sums / floor", "Gram / class sums", "auto / better of both"],
                [
                    [
                        f"{r['batch']:,}",
                        f"{r['width']:,}",
                        f"{r['class_sums_over_floor']:.2f}",
                        f"{r['gram_over_class_sums']:.2f}",
                        f"{r['auto_over_best']:.2f}",
                    ]
                    for r in loss["rows"]
                ],
            ),
            "For small batches the ratio is a fixed fifth of a millisecond of tensor operations "
            "and, for wide layers, tables of classes by features as large as the batch itself. For "
            "the largest ones nearly all time goes into fresh memory from the operating system, on "
            "both sides, so ratios below 1 say nothing about the arithmetic.",
            "Loading, per step, over a hand-written index-and-gather loop with the same draws, and "
            "Avalanche's `ReplayPlugin` over `ERPlugin` on the same work:",
            _rows(
                ["batch", "ER / by hand", "BER / by hand", "Avalanche / ER"],
                [
                    [
                        str(r["batch"]),
                        f"{r['er_over_raw']:.2f}",
                        f"{r['ber_over_raw']:.2f}",
                        f"{r['avalanche_replay_over_er']:.2f}",
                    ]
                    for r in loading["rows"]
                ],
            ),
            f"Milliseconds per step beyond a hand-written step on as many samples, along a stream "
            f"of {stream['experiences']} experiences:",
            _long_stream(stream["rows"]),
            "Processor time of a whole experience on the 391 experiences of the rendered NIC "
            "track, medians of 50 (BER: from where it has reached its bound of 32 past "
            "experiences on):",
            _rows(
                ["method", "first 50, ms", "last 50, ms", "last / first"],
                [
                    [
                        find_card(r["method"]).title,
                        f"{r['first_ms']:.1f}",
                        f"{r['last_ms']:.1f}",
                        f"{r['last_ms'] / r['first_ms']:.2f}",
                    ]
                    for r in _perf("nic_stream")["rows"]
                ],
            ),
        ]
    )


def beside_avalanche(_: str) -> str:
    """Split MNIST with generated replay, ours and Avalanche's."""
    titles = {
        "interleaved": "DGR, generator trained on the solver's samples",
        "in turn": "DGR, solver, then generator",
        "avalanche": "Avalanche's GenerativeReplay",
    }
    lines = []
    for r in _perf("generative_replay_stream")["rows"]:
        accuracy = [100 * a for a in r["accuracy"]]
        spread = f"{statistics.fmean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}"
        seconds = f"{statistics.median(r['seconds']):.0f}"
        lines.append([titles[r["method"]], str(r["epochs"]), seconds, spread])
    return _rows(["method", "epochs", "seconds", "accuracy %"], lines)


def speed_of_methods(_: str) -> str:
    """Steps and passes of the methods that are more than a loader and a loss."""
    frozen = [r for r in _perf("pruned_extractor")["rows"] if r["batch"] == 128]
    names = {
        "dense": "dense", "folded": "batch norms folded",
        "pruned_0.5_multiple_1": "half the channels, folded",
        "pruned_0.28_multiple_1": "28 % of the channels, folded",
    }  # fmt: skip
    steps = {(r["extractors"], r["variant"]): r for r in _perf("expandable_step")["rows"]}
    slni = _perf("inhibition")["rows"]
    selfless = {(r["network"], r["method"]): r for r in _perf("selfless_step")["rows"]}
    passes = {r["network"]: r["over_plain"] for r in _perf("importance")["rows"]}
    networks = {"mlp": "MLP 784-100-100-10, 2,000 images", "slim_resnet18": "SlimResNet18, 100"}
    [replay] = _perf("generative_replay")["rows"]
    latent = _perf("latent_memory")["rows"]
    online = {(r["width"], r["method"]): r for r in _perf("online_memory")["rows"]}
    return "\n\n".join(
        [
            "Forward pass of a frozen ResNet-18 of ExpandableDER, 128 images:",
            _rows(
                ["extractor", "parameters", "FLOPs of the dense", "times as quick"],
                [
                    [names[r["extractor"]], f"{r['parameters']:,}", f"{r['flops_of_dense']:.3f}",
                     f"{r['speed_over_dense']:.2f}"]
                    for r in frozen if r["extractor"] in names
                ],
            ),
            "A training step of ExpandableDER with ResNet-32 against the number of extractors, "
            "over a plain loop over them:",
            _rows(
                ["extractors", "plain loop, ms", "folded", "looking ahead", "pruned"],
                [
                    [str(t), f"{1e3 * steps[t, 'loop']['seconds_per_step']:.0f}",
                     *(f"{steps[t, v]['over_loop']:.2f}" for v in ("folded", "look_ahead",
                                                                   "pruned"))]
                    for t in sorted({t for t, _ in steps})
                ],
            ),
            "SLNI's regulariser, forward and backward, `auto` over one read and one write of the "
            "activations, and the released form over `auto`:",
            _rows(
                ["N", "B", "auto / floor", "released / auto"],
                [
                    [f"{r['width']:,}", str(r["batch"]), f"{r['auto_over_floor']:.1f}",
                     f"{r['released_over_auto']:.1f}" if r.get("released_over_auto") else "not run"]
                    for r in slni
                ],
            ),
            "A training step on 200 images with each of them over the step without:",
            _rows(
                ["method", "MLP 784-128-128-10", "ConvNet of CIFAR-100"],
                [
                    [find_card(k).title, *(f"{selfless[n, k]['over_naive']:.2f}"
                                           for n in ("mlp", "conv_mlp"))]
                    for k in dict.fromkeys(k for _, k in selfless) if k != "naive"
                ],
            ),
            "Importance passes over an epoch of plain training on the same images; Avalanche's "
            "look at the gradient of batches, which is another quantity:",
            _rows(
                ["pass", *networks.values()],
                [
                    [title, *(f"{passes[n][f'pass_{key}']:.2f}" for n in networks)]
                    for key, title in (
                        ("fisher_sampled", "EWC"), ("output_norm", "MAS"),
                        ("avalanches_ewc", "Avalanche's EWC"),
                        ("avalanches_mas", "Avalanche's MAS"),
                    )
                ],
            ),
            "A step of DGR on Split MNIST (128 new images, 128 replays, VAE of 784-400-400-100) "
            "over a step without, time beside the matrix products that it needs:",
            _rows(
                ["step", "time", "work"],
                [
                    [title, f"{replay['over_naive'][key]:.2f}",
                     f"{replay['flops_over_naive'][key]:.2f}"]
                    for key, title in (
                        ("replay", "replay, generator not trained"),
                        ("interleaved", "replay, generator trained on the same samples"),
                        ("in turn", "solver, then generator"),
                        ("avalanche", "the same with Avalanche's GenerativeReplay"),
                    )
                ],
            ),
            "A step with a memory in latent space (MLP 784-400-200-10, 64 new images and 64 "
            "features) over a step without, and experiences of one epoch, their ends included:",
            _rows(
                ["memory", "step", "experience", "late / early step"],
                [
                    [_LATENT[r["method"]], f"{r['over_plain']:.2f}",
                     f"{r['experience_over_plain']:.2f}", f"{r['late_over_early']:.2f}"]
                    for r in latent if r["method"] in _LATENT
                ],
            ),
            "A step on 10 images with the online plugins over a step without:",
            _rows(
                ["method", "MLP 64-100-100-10", "MLP 784-400-400-10"],
                [
                    [title, *(f"{online[w, key]['over_plain']:.1f}" for w in (64, 784))]
                    for key, title in (
                        ("er", "ER"), ("lookahead", "look-ahead, second order"),
                        ("distillation_1", "distillation, 1 step"),
                        ("distillation_10", "distillation, 10 steps"),
                        ("projection_16", "projection, 16 inputs"),
                    )
                ],
            ),
        ]
    )  # fmt: skip


_LATENT = {
    "gaussian": "20 directions, encoder frozen", "gaussian_full": "full covariance, encoder frozen",
    "gaussian_diagonal": "diagonal, encoder frozen", "mixture": "mixture, encoder frozen",
    "vae": "VAE, encoder frozen", "distill": "full covariance, encoder distilled",
    "replay": "stored features, encoder frozen",
}  # fmt: skip


def _step_time(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        ratio, step = r["over_by_hand"], r["milliseconds_per_step"]
        lines.append(
            [
                r["work"],
                str(r["batch"]),
                find_card(r["method"]).title,
                f"{step['by_hand']:.2f}",
                *(f"{ratio[k]:.2f}" for k in ("ours", "avalanche", "avalanche_workers")),
            ]
        )
    head = ["network", "batch", "method", "by hand, ms", "with DeviceData", "Avalanche",
            "Avalanche, 2 workers"]  # fmt: skip
    return _rows(head, lines)


def _long_stream(rows: list[dict[str, Any]]) -> str:
    points = [5, 50, 200, 399]
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    lines = []
    for mode in modes:
        cells = [mode]
        for point in points:
            near = [r for r in rows if r["mode"] == mode and abs(r["experience"] - point) <= 2]
            extra = sorted(
                r["milliseconds_per_step"] - r["by_hand_milliseconds_per_step"] for r in near
            )
            cells.append(f"{extra[len(extra) // 2]:.2f} ({near[0]['rows_per_step']:,.0f})")
        lines.append(cells)
    return _rows(["mode", *(f"experience {p} (samples per step)" for p in points)], lines)


def _perf(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "perf" / f"{name}.json").read_text("utf-8"))


def _rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text("utf-8")), "utf-8")
    print(f"{readme}: filled")
