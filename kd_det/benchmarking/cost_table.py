"""Formats measurements as Markdown."""

from tabulate import tabulate

STEPS = ["A: plain step, ms", "B: teacher, ms", "C: KD step, ms"]
RATES = ["C / A", "images/s"]
KEPT = "kept by the heads, MB"
MEMORY = "peak memory of C, MB"
# Maps what is measured on a GPU to the header of its column and the format of its values.
ON_GPU = {
    "gpu": ("C on the GPU, ms", "{:.1f}"),
    "idle": ("idle", "{:.0%}"),
    "kernels": ("kernels", "{:.0f}"),
    "waits": ("waits", "{:d}"),
}


def combinations_table(results: dict) -> str:
    """Formats the results for combinations of heads, which include operations."""
    rows = []
    for name, x in results["rows"].items():
        ratio = f"{x['ratio']:.3f} ({x['ratio_low']:.3f} - {x['ratio_high']:.3f})"
        operations, kept, memory = f"{x['ratio_of_operations']:.3f}", f"{x['kept']:.1f}", f"{x['memory']:.0f}"
        rows.append([name, *times(x), ratio, operations, *rates(x), *on_gpu(x), kept, memory])
    headers = ["KD.HEADS", *STEPS, "C / (A + B)", "in arithmetic", *RATES, *gpu_headers(results), KEPT, MEMORY]
    note = (
        "quartiles of the ratio in brackets. In arithmetic: the same ratio for the multiply-adds of convolutions and "
        "matrix products, which is the cost of the heads by definition. Kept by the heads: what autograd saves in them "
        "until the backward pass, apart from the features of both networks."
    )
    return markdown(rows, headers) + describe(results, note)


def switches_table(results: dict) -> str:
    """Formats the results for switches; in the first row all of them are off."""
    off = next(iter(results["rows"].values()))["C"]
    rows = [
        [name, *times(x), f"{x['ratio']:.3f}", *rates(x), f"{off / x['C']:.2f}", *on_gpu(x), f"{x['memory']:.0f}"]
        for name, x in results["rows"].items()
    ]
    headers = ["switched on", *STEPS, "C / (A + B)", *RATES, "times as fast", *gpu_headers(results), MEMORY]
    note = f"all with {','.join(results['heads'])}. Times as fast: C with all off over C."
    return markdown(rows, headers) + describe(results, note)


def markdown(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def times(x: dict[str, float]) -> list[str]:
    return [f"{x[key]:.0f}" if x[key] >= 1000 else f"{x[key]:.3g}" for key in "ABC"]


def rates(x: dict[str, float]) -> list[str]:
    return [f"{x['ratio_to_plain']:.3f}", f"{x['images_per_second']:.3g}"]


def on_gpu(x: dict[str, float]) -> list[str]:
    """Formats what a distillation step does on the GPU; empty if it was measured on a CPU."""
    return [form.format(x[key]) for key, (_, form) in ON_GPU.items() if key in x]


def gpu_headers(results: dict) -> list[str]:
    measured = next(iter(results["rows"].values()))
    return [header for key, (header, _) in ON_GPU.items() if key in measured]


def describe(results: dict, note: str) -> str:
    """Describes how a table was measured."""
    named = " and ".join(x[0] for x in (results["teacher"], *results["further"]) if x)
    teacher = named or f"R{results['depths'][1]}-FPN"
    precision = "float32" if results["amp"] == "none" else f"mixed precision of {results['amp']}"
    on_a_gpu = bool(gpu_headers(results))
    return (
        f"\n\nMask R-CNN R{results['depths'][0]}-FPN from {teacher}, random weights, "
        f"{results['batch']} images of {results['size']} x {results['size']}, {precision}, on {results['device']}. "
        f"Medians of {results['rounds']} interleaved rounds; {note} SoftTargetHead: roi, rpn and mask. Memory: "
        f"{results['memory_kind']}, in one process per row; the plain student needs {results['plain_memory']:.0f} MB."
        + (" Idle: share of C in which the GPU does nothing. Waits: of the host for the GPU." if on_a_gpu else "")
    )
