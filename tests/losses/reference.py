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


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def focal_soft_target_loss(s, t, *, beta=1.0, weights=None, normalizer):
    p, q = sigmoid(t), sigmoid(s)
    rows = (np.abs(q - p) ** beta * -(p * np.log(q) + (1 - p) * np.log(1 - q))).sum(axis=-1)
    return (rows if weights is None else weights * rows).sum() / normalizer


def standardize_logits(x, *, eps=1e-7):
    return np.stack([(row - row.mean()) / (row.std(ddof=1) + eps) for row in x])


def within_group_loss(s, t, mask, *, temperature, weights=None):
    rows = [
        divergence(softmax(b[m] / temperature), softmax(a[m] / temperature)) for a, b, m in zip(s, t, mask, strict=True)
    ]
    return temperature**2 * np.mean(rows if weights is None else weights * np.array(rows))


def between_groups_loss(s, t, groups, *, temperature, weights=None):
    rows = []
    for a, b, ids in zip(softmax(s / temperature), softmax(t / temperature), groups, strict=True):
        present = sorted(set(ids))
        rows.append(divergence([b[ids == i].sum() for i in present], [a[ids == i].sum() for i in present]))
    return temperature**2 * np.mean(rows if weights is None else weights * np.array(rows))


def target_class_loss(s, t, labels):
    return np.mean([-b[y] * math.log(a[y]) for a, b, y in zip(softmax(s), softmax(t), labels, strict=True)])


def correlation_loss(s, t, *, dim):
    s, t = (s, t) if dim == 1 else (s.T, t.T)
    out = []
    for a, b in zip(s, t, strict=True):
        a, b = a - a.mean(), b - b.mean()
        out.append(1 - a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b) + 1e-8))
    return np.mean(out)


def channel_wise_loss(s, t, *, temperature=1.0, mask=None):
    mask = np.ones_like(s[:, :1], dtype=bool) if mask is None else mask
    rows = [
        divergence(softmax(t[n, c][mask[n, 0]] / temperature), softmax(s[n, c][mask[n, 0]] / temperature))
        for n, c in np.ndindex(s.shape[:2])
    ]
    return temperature**2 * np.mean(rows)


def pearson_loss(s, t, *, eps=1e-6, mask=None):
    mask = np.ones_like(s[:, :1], dtype=bool) if mask is None else mask
    out = []
    for c in range(s.shape[1]):
        a, b = ((x - x.mean()) / (x.std(ddof=1) + eps) for x in (s[:, c][mask[:, 0]], t[:, c][mask[:, 0]]))
        out.append(((a - b) ** 2).mean() / 2)
    return np.mean(out)


def masked_generation_loss(generated, t, *, reduction="sum", mask=None):
    squared = (generated - t) ** 2
    squared = squared if mask is None else squared[np.broadcast_to(mask, t.shape)]
    return squared.mean() if reduction == "mean" else squared.sum() / len(t)


def feature_attention(x, *, temperature=0.5):
    n, c, h, w = x.shape
    spatial = softmax(np.abs(x).mean(axis=1).reshape(n, h * w) / temperature).reshape(n, h, w)
    return h * w * spatial, c * softmax(np.abs(x).mean(axis=(2, 3)) / temperature)


def focal_loss(s, t, *, weight, temperature=0.5):
    spatial, channel = feature_attention(t, temperature=temperature)
    total = sum(
        weight[n, i, j] * spatial[n, i, j] * channel[n, c] * (s[n, c, i, j] - t[n, c, i, j]) ** 2
        for n, c, i, j in np.ndindex(s.shape)
    )
    return total / len(s)


def attention_loss(s, t, *, temperature=0.5):
    pairs = zip(
        feature_attention(s, temperature=temperature), feature_attention(t, temperature=temperature), strict=True
    )
    return sum(np.abs(a - b).sum() for a, b in pairs) / len(s)


def relation_loss(s, t):
    return ((s - t) ** 2).sum() / len(s)


def region_loss(s, t, *, mask, per_channel=True):
    cells = [(n, i, j) for n, _, i, j in np.ndindex(mask.shape) if mask[n, 0, i, j]]
    total = sum(((s[n, :, i, j] - t[n, :, i, j]) ** 2).sum() for n, i, j in cells)
    return total / (2 * len(cells) * (s.shape[1] if per_channel else 1))


def node_loss(s, t):
    return ((s - t) ** 2).mean()


def edge_loss(s, t):
    cosines = [np.array([[a @ b for a in x] for b in x]) for x in (unit(s), unit(t))]
    return ((cosines[0] - cosines[1]) ** 2).mean() / 2


def similarity_loss(s, t, *, kind="gram"):
    if kind == "cosine":
        return edge_loss(s, t)
    s, t = (unit(x.reshape(len(x), -1) @ x.reshape(len(x), -1).T) for x in (s, t))
    return ((s - t) ** 2).sum() / len(s) ** 2


def smooth_l1(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def distance_relation_loss(s, t):
    relative = []
    for x in (s, t):
        distances = np.array([[math.dist(a.flat, b.flat) for a in x] for b in x])
        relative.append(distances / distances[distances > 0].mean())
    return smooth_l1(relative[0] - relative[1]).mean()


def angle_relation_loss(s, t):
    def cosine(a, b):
        return a @ b / math.sqrt((a @ a) * (b @ b)) if a.any() and b.any() else 0

    def angles(x):
        return np.array([[[cosine(j - i, k - i) for k in x] for j in x] for i in x.reshape(len(x), -1)])

    s, t = (x.reshape(len(x), -1) for x in (s, t))
    return smooth_l1(angles(s) - angles(t)).mean()


def decode_boxes(deltas, anchors, *, weights):
    boxes = []
    for (dx, dy, dw, dh), (x0, y0, x1, y1) in zip(deltas / np.array(weights), anchors, strict=True):
        x, y = x0 + (0.5 + dx) * (x1 - x0), y0 + (0.5 + dy) * (y1 - y0)
        w, h = (x1 - x0) * min(math.exp(dw), 62.5), (y1 - y0) * min(math.exp(dh), 62.5)
        boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return np.array(boxes)


def box_overlap_loss(s, t, *, weights, normalizer):
    total = 0.0
    for a, b, weight in zip(s, t, weights, strict=True):
        width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
        union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
        hull = math.prod(max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
        total += weight * (1 - width * height / union + (hull - union) / hull)
    return total / normalizer


def bounded_regression_loss(s, t, targets, *, margin=0.0):
    rows = []
    for a, b, y in zip(s, t, targets, strict=True):
        error = ((a - y) ** 2).sum()
        rows.append(error if error + margin > ((b - y) ** 2).sum() else 0)
    return np.mean(rows)
