"""The losses once more in plain numpy, float64, element by element where that is clearer: slow, without torch."""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    """Flattens each sample and scales it to length 1."""
    return np.stack([row / math.sqrt((row**2).sum()) for row in x.reshape(len(x), -1)])


def pool(x, height, width):
    """Averages (N, C, H, W) over adaptive bins: bin i of n on a length L spans floor(iL / n) to ceil((i+1)L / n)."""

    def bins(length, count):
        return [slice(math.floor(i * length / count), math.ceil((i + 1) * length / count)) for i in range(count)]

    rows, columns = bins(x.shape[2], height), bins(x.shape[3], width)
    return np.stack([np.stack([x[:, :, r, c].mean(axis=(2, 3)) for c in columns], axis=-1) for r in rows], axis=-2)


def soft_target_loss(s, t, *, temperature, weights=None):
    k = s.shape[-1]
    taus = np.broadcast_to(temperature, s.shape[:-1]).reshape(-1)
    weights = np.ones(taus.shape) if weights is None else weights
    rows = []
    for s_row, t_row, tau, weight in zip(s.reshape(-1, k), t.reshape(-1, k), taus, weights, strict=True):
        p, q = softmax(t_row / tau), softmax(s_row / tau)
        rows.append(weight * tau**2 * sum(p[i] * math.log(p[i] / q[i]) for i in range(k)))
    return np.mean(rows)


def binary_soft_target_loss(s, t, *, weights=None):
    p, q = sigmoid(t), sigmoid(s)
    return np.average(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), weights=weights)


def mutual_loss(own, peer):
    return soft_target_loss(own, peer, temperature=1.0)


def born_again_loss(s, t):
    return -np.mean((softmax(t) * np.log(softmax(s))).sum(axis=-1))


def softmax_regression_loss(s, t, *, kind="mse", temperature=1.0):
    return born_again_loss(s / temperature, t / temperature) if kind == "ce" else np.mean((s - t) ** 2)


def confidence_weights(t):
    top = softmax(t).max(axis=1)
    return top / top.sum()


def adjust_probability_shift(probs, labels):
    out = probs.copy()
    for row, label in zip(out, labels, strict=True):
        top = row.argmax()
        row[top], row[label] = row[label], row[top]
    return out


def adjust_label_smoothing(probs, labels, *, correct_prob):
    out = probs.copy()
    for row, label in zip(out, labels, strict=True):
        if row.argmax() != label:
            row[:] = (1 - correct_prob) / (len(row) - 1)
            row[label] = correct_prob
    return out


def dynamic_temperature(s, t, *, kind, base, beta, gamma=1.0, bounds):
    if kind == "flsw":
        weight = np.array([(1 - a @ b / math.sqrt((a @ a) * (b @ b))) ** gamma for a, b in zip(s, t, strict=True)])
    else:
        weight = 1 / softmax(s).max(axis=1)
    return np.clip(base + beta * (weight.mean() - weight), *bounds)


def attention_map(f, *, power=2, mask=None):
    energy = (np.abs(f) ** power).mean(axis=1, keepdims=True)
    return unit(energy if mask is None else np.where(mask, energy, 0))


def attention_transfer_loss(s, t, *, power=2, reduction="mean", mask=None):
    size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    maps = [attention_map(pool(x, *size), power=power, mask=mask) for x in (s, t)]
    total = ((maps[0] - maps[1]) ** 2).sum()
    if reduction == "sum_hw":
        return total / len(s)
    if reduction == "norm":
        return np.mean([math.sqrt(((a - b) ** 2).sum()) for a, b in zip(*maps, strict=True)])
    return total / (maps[0].size if mask is None else mask.sum())


def input_gradient_loss(s, t):
    return np.mean([math.sqrt(((a - b) ** 2).sum()) / 2 for a, b in zip(s, t, strict=True)])


def hint_loss(s, t, *, mask=None):
    squared = (s - t) ** 2
    return squared.mean() if mask is None else squared[np.broadcast_to(mask, s.shape)].mean()


def hierarchical_context_loss(s, t, *, levels=(4, 2, 1), mask=None):
    mask = np.ones_like(s[:, :1], dtype=bool) if mask is None else mask
    loss, total, weight = hint_loss(s, t, mask=mask), 1.0, 1.0
    for level in levels:
        if level >= s.shape[2]:
            continue
        covered = pool(mask.astype(float), level, level)
        valid = np.broadcast_to(covered > 0, (*s.shape[:2], level, level))
        s_pooled, t_pooled = (pool(x * mask, level, level) / np.where(covered > 0, covered, 1) for x in (s, t))
        weight /= 2
        total += weight
        loss += weight * ((s_pooled - t_pooled)[valid] ** 2).mean()
    return loss / total


def factor_transfer_loss(s, t, *, p=1):
    return (np.abs(unit(s) - unit(t)) ** p).mean() ** (1 / p)


def inheritance_loss(s, t, *, kind="ft", p=1, cosine=False):
    if cosine:
        return 1 - cosines(s, t, kind=kind).mean()
    if kind == "od":
        return np.mean([math.sqrt((row**2).sum()) for row in np.maximum(s, 0) - np.maximum(t, 0)])
    return (
        factor_transfer_loss(s, t, p=p)
        if kind == "ft"
        else factor_transfer_loss(attention_map(s), attention_map(t), p=p)
    )


def cosines(s, t, *, kind):
    s, t = (attention_map(s), attention_map(t)) if kind == "at" else (unit(s), unit(t))
    return np.array([(a * b).sum() for a, b in zip(s, t, strict=True)])


def exploration_loss(s, t, *, kind="ft", p=1, cosine=False):
    if cosine:
        return np.abs(cosines(s, t, kind=kind)).mean()
    return -inheritance_loss(s, t, kind=kind, p=p)


def activation_boundary_loss(s, t, *, margin=1.0):
    total = 0.0
    for a, b in zip(s.flat, t.flat, strict=True):
        if b > 0 and a <= margin:
            total += (a - margin) ** 2
        if b <= 0 and a > -margin:
            total += (a + margin) ** 2
    return total / len(s)


def overhaul_loss(s, t, *, margin):
    total = 0.0
    for n, c, i, j in np.ndindex(s.shape):
        target = max(t[n, c, i, j], margin[c])
        if s[n, c, i, j] > target or target > 0:
            total += (s[n, c, i, j] - target) ** 2
    return total / len(s)


def margin_from_batch_norm(weight, bias):
    """Integrates x and 1 over the negative half of the normal density by Simpson's rule on 20001 points."""
    out = []
    for sigma, centre in zip(np.abs(weight), bias, strict=True):
        low = min(centre, 0) - 12 * sigma
        x = np.linspace(low, 0, 20001)
        simpson = np.ones_like(x)
        simpson[1:-1:2], simpson[2:-1:2] = 4, 2
        density = simpson * np.exp(-((x - centre) ** 2) / (2 * sigma**2))
        probability = density.sum() * (x[1] - x[0]) / 3 / (sigma * math.sqrt(2 * math.pi))
        out.append((x * density).sum() / density.sum() if probability > 0.001 else -3 * sigma)
    return np.array(out)


def feature_matching_loss(s, t):
    s, t = (x.mean(axis=(2, 3)) if x.ndim == 4 else x for x in (s, t))
    return np.mean((s - t) ** 2)
