"""The loss of ours and of the library's class on the same data from the same weights: curves, and what noise is.

One process a seed trains three copies: the library's, ours with its bias update off (the library has none), ours with
it on. The data are a stream with something to learn (`markov_rows`) or the rows of a packed data set.
"""

import gc

import torch

from benchmarks.train_cases import autocast, build_model, expert_load, our_model

CURVES = ("library", "ours, bias update off", "ours, bias update on")
BIAS_UPDATE_SPEED = 0.001  # DeepSeek-V3 (arXiv:2412.19437), Sec. 4.2
WARMUP_STEPS, WINDOW, LAST = 20, 10, 50


def markov_rows(vocab_size, rows, length, seed, table_seed=0):
    """(rows, length) int64: each token is followed by one of four, drawn with shares 1/2, 1/4, 1/8, 1/8.

    The four are drawn once (`table_seed`) from a Zipf law, so that some tokens are common and experts are not evenly
    wanted. An optimal model's loss is 1.21 nats a token.
    """
    generator = torch.Generator().manual_seed(table_seed)
    zipf = 1.0 / torch.arange(1, vocab_size - 1, dtype=torch.float64)
    following = 2 + torch.multinomial(zipf, vocab_size * 4, replacement=True, generator=generator).view(-1, 4)
    generator = torch.Generator().manual_seed(seed + 1)
    token = 2 + torch.multinomial(zipf, rows, replacement=True, generator=generator)
    shares, found = torch.tensor([0.5, 0.25, 0.125, 0.125]), [token]
    for _ in range(length - 1):
        token = following[token, torch.multinomial(shares, rows, replacement=True, generator=generator)]
        found.append(token)
    return torch.stack(found, dim=1)


def loss_batches(job):
    """Yields `steps` batches of model inputs, the same for every model of a seed."""
    rows = job["steps"] * job["batch"]
    if not job.get("dataset"):
        for ids in markov_rows(job["fields"]["vocab_size"], rows, job["length"], job["seed"]).split(job["batch"]):
            yield {"input_ids": ids, "labels": ids}
        return
    from recipes.data import PackedTokens

    data = PackedTokens(job["dataset"], "train", job["length"], vocab_size=job["fields"]["vocab_size"])
    if len(data) < job["batch"]:
        raise ValueError(f"dataset={job['dataset']} has {len(data)} rows of length={job['length']}, fewer than a batch "
                         f"of {job['batch']}; lower --length or --batch")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(job["seed"])).tolist()
    for first in range(0, rows, job["batch"]):
        chosen = [data[order[(first + place) % len(order)]] for place in range(job["batch"])]
        yield {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def train_curve(job, model, updates_bias):
    """([loss of each step], largest over mean load of the experts at the end) of a bare loop with clipping at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    losses = []
    for batch in loss_batches(job):
        batch = {name: values.to(job["device"]) for name, values in batch.items()}
        with autocast(job):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if hasattr(model, "update_expert_bias"):
            model.update_expert_bias(speed=None if updates_bias else 0.0)
        losses.append(loss.detach().float())
    return torch.stack(losses).tolist(), expert_load(model, batch["input_ids"], lambda: autocast(job))


def measure_losses(job):
    """One line for one seed: three curves from the same weights on the same data."""
    library = build_model(job | {"variant": "library-" + job["weights"]})
    start = {name: value.cpu().clone() for name, value in library.state_dict().items()}
    curves, loads = {}, {}
    for name in CURVES:
        if name == "library":
            model, library = library, None
        else:
            fields = {"bias_update_speed": BIAS_UPDATE_SPEED, "seq_aux_loss_alpha": 0.0} | job["fields"]
            with torch.device(job["device"]):
                model = our_model(fields)
            model = (model.bfloat16() if job["weights"] == "bf16" else model).train()
            model.load_state_dict(start)
        curves[name], loads[name] = train_curve(job, model, name.endswith("on"))
        model = None
        gc.collect()
    return {"seed": job["seed"], "curves": curves, "load_max_over_mean": loads, "steps": job["steps"],
            "data": job.get("dataset") or "Markov stream"}  # fmt: skip


def smooth(values, window=WINDOW):
    """Moving average; the first values over what there is."""
    return [sum(values[max(0, i - window + 1):i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def compare_curves(lines):
    """Largest difference of the smoothed curves from the library's, mean difference of the last steps, and the spread
    of the library's own smoothed curve over the seeds."""
    lines = [line for line in lines if "curves" in line]
    if not lines:
        return {"variant": "losses", "error": "no seed finished"}
    smoothed = {name: [smooth(line["curves"][name]) for line in lines] for name in CURVES}
    reference, result = smoothed["library"], {"variant": "losses", "seeds": len(lines), "window": WINDOW}
    for name in CURVES[1:]:
        differences = [[a - b for a, b in zip(ours, theirs)] for ours, theirs in zip(smoothed[name], reference)]
        last = [sum(difference[-LAST:]) / len(difference[-LAST:]) for difference in differences]
        result[name] = {
            "largest_difference": float(f"{max(abs(value) for row in differences for value in row):.3g}"),
            f"mean_of_last_{LAST}_by_seed": [float(f"{value:.3g}") for value in last],
            "load_max_over_mean": [round(line["load_max_over_mean"][name], 3) for line in lines],
        }  # fmt: skip
    result["library"] = {
        "spread_over_seeds": float(f"{max(max(column) - min(column) for column in zip(*reference)):.3g}"),
        "final_loss": [round(curve[-1], 4) for curve in reference],
        "load_max_over_mean": [round(line["load_max_over_mean"]["library"], 3) for line in lines],
    }  # fmt: skip
    return result


def curve_figure(series, xlabel, ylabel):
    """SVG of {label: [(xs, ys) of each seed]}: the mean, and a band from least to largest where seeds share xs."""
    from matplotlib import pyplot as plt

    from recipes.report_page import COLORS, figure_svg

    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for (label, runs), color in zip(series.items(), COLORS):
        columns = list(zip(*(ys for _, ys in runs)))
        xs = runs[0][0][: len(columns)]
        axes.plot(xs, [sum(column) / len(column) for column in columns], label=label, color=color, linewidth=1.4)
        if len(runs) > 1:
            axes.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure_svg(figure)


def losses_figure(lines):
    lines = [line for line in lines if "curves" in line]
    series = {
        name: [(list(range(1, line["steps"] + 1)), smooth(line["curves"][name])) for line in lines] for name in CURVES
    }
    return curve_figure(series, "optimizer step", f"loss, mean of {WINDOW} steps (nats per token)")
