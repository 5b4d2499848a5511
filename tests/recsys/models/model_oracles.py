"""The formulas of the models, written out in loops over single numbers: no tensor, no float32.

An oracle is called for one row: weights {name of the module's parameter: float64 array}, options, dense features x,
embeddings e (one list of D numbers a sparse feature), first-order numbers u (one a sparse feature) -> logit.
"""

import math
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


def dot(x, y):
    assert len(x) == len(y)
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def plus(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def relu(x):
    return [max(0.0, a) for a in x]


def joined(vectors):
    return [a for vector in vectors for a in vector]


def times(matrix, x):
    return [dot(row, x) for row in matrix]


def layers(weights, prefix):
    """[(W, b)] of the linear layers under the prefix, in order."""
    arrays = [array for name, array in weights.items() if name.startswith(prefix)]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def mlp(weights, prefix, x, relu_at_the_end):
    stack = layers(weights, prefix)
    for index, (matrix, bias) in enumerate(stack):
        x = plus(times(matrix, x), bias)
        if relu_at_the_end or index < len(stack) - 1:
            x = relu(x)
    return x


def deep_part(weights, x):
    (logit,) = mlp(weights, "top_mlp.", x, relu_at_the_end=False)
    return logit


def first_order(weights, x, u):
    return sum(u) + (dot(weights["first_order.dense.weight"][0], x) if x else 0.0)


def dlrm(weights, options, x, e, u):
    x_0 = mlp(weights, "dense_arch.", x, relu_at_the_end=True)
    vectors = [x_0, *e]
    if options.interaction == "dot":
        dots = [dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
        found = [*x_0, *dots]
    elif options.interaction == "projection":
        dim, (rows, columns) = len(x_0), options.projection_rows
        y = mlp(weights, "inter_arch.interaction_branch1.", joined(vectors), relu_at_the_end=True)
        z = mlp(weights, "inter_arch.interaction_branch2.", joined(vectors), relu_at_the_end=True)
        found = list(x_0)
        for row in range(rows):
            for column in range(columns):
                found.append(sum(y[row * dim + d] * z[d * columns + column] for d in range(dim)))
    else:
        start = joined(vectors)
        found = start
        for layer in range(options.cross_layers):
            w, v, b = (weights[f"inter_arch.crossnet.{k}.{layer}"] for k in ("W_kernels", "V_kernels", "bias"))
            crossed = plus(times(w, times(v, found)), b)
            found = [start[n] * crossed[n] + found[n] for n in range(len(start))]
    (logit,) = mlp(weights, "over_arch.", found, relu_at_the_end=False)
    return logit


def dcn(weights, options, x, e, u):
    x_0 = [*joined(e), *x]
    x_l = x_0
    for layer in range(options.cross_layers):
        w, b = (weights[f"interaction.0.{kind}.{layer}"][:, 0] for kind in ("kernels", "bias"))
        scale = dot(x_l, w)
        x_l = [x_0[n] * scale + b[n] + x_l[n] for n in range(len(x_0))]
    return dot(weights["interaction.1.weight"][0], x_l) + deep_part(weights, x_0)


def autoint(weights, options, x, e, u):
    fields = [list(vector) for vector in e]
    for s, value in enumerate(x):
        fields.append([value * v for v in weights["dense_fields.vectors"][s]])
    inputs = fields
    for layer in range(options.attention_layers):
        query, key, value, residual = (
            weights[f"interaction.{layer}.{kind}.weight"] for kind in ("query", "key", "value", "residual")
        )
        found = []
        for e_m in inputs:
            of_heads = []
            for head in range(options.heads):
                rows = slice(head * options.head_dim, (head + 1) * options.head_dim)
                scores = [math.exp(dot(times(query[rows], e_m), times(key[rows], e_k))) for e_k in inputs]
                values = [times(value[rows], e_k) for e_k in inputs]
                of_heads += [
                    sum(s * v[d] for s, v in zip(scores, values, strict=True)) / sum(scores)
                    for d in range(options.head_dim)
                ]
            found.append(relu(plus(of_heads, times(residual, e_m))))
        inputs = found
    last = f"interaction.{options.attention_layers + 1}"
    logit = dot(weights[f"{last}.weight"][0], joined(inputs))
    return logit + (deep_part(weights, joined(fields)) if options.top_mlp else weights[f"{last}.bias"][0])


def deepfm(weights, options, x, e, u):
    pairs = sum(dot(e[f], e[g]) for f in range(len(e)) for g in range(f + 1, len(e)))
    return first_order(weights, x, u) + pairs + deep_part(weights, [*joined(e), *x])


def xdeepfm(weights, options, x, e, u):
    dim, maps, pooled = len(e[0]), e, []
    for layer, size in enumerate(options.feature_maps):
        w = weights[f"interaction.0.weights.{layer}"].reshape(size, len(maps), len(e))
        maps = [
            [
                sum(w[h][i][j] * maps[i][d] * e[j][d] for i in range(len(maps)) for j in range(len(e)))
                for d in range(dim)
            ]
            for h in range(size)
        ]
        pooled += [sum(vector) for vector in maps]
    explicit = dot(weights["interaction.1.weight"][0], pooled)
    return first_order(weights, x, u) + explicit + deep_part(weights, [*joined(e), *x])


def fibinet(weights, options, x, e, u):
    def pairs(vectors, matrices):
        found = []
        for f in range(len(vectors)):
            for g in range(f + 1, len(vectors)):
                place = {"all": 0, "each": f, "interaction": len(found)}[options.bilinear]
                projected = times(matrices[place], vectors[f])
                found.append([a * b for a, b in zip(projected, vectors[g], strict=True)])
        return joined(found)

    squeezed = [sum(vector) / len(vector) for vector in e]
    hidden = relu(times(weights["interaction.senet.squeeze.weight"], squeezed))
    importance = relu(times(weights["interaction.senet.excite.weight"], hidden))
    reweighted = [[a * value for value in vector] for a, vector in zip(importance, e, strict=True)]
    p = pairs(e, weights["interaction.original.weight"])
    q = pairs(reweighted, weights["interaction.reweighted.weight"])
    return first_order(weights, x, u) + deep_part(weights, [*p, *q, *x])


def find_oracle(architecture):
    """The formula of a registered model. Fails, naming the file to edit, for one that has none here yet."""
    if architecture not in ORACLES:
        pytest.fail(
            f"model {architecture!r} has no formula to be tested against: write it in plain Python as a function in "
            f"tests/{Path(__file__).relative_to(TESTS)}, and add a line to ORACLES there"
        )
    return ORACLES[architecture]


ORACLES = {
    "autoint": autoint,
    "dcn": dcn,
    "deepfm": deepfm,
    "dlrm": dlrm,
    "fibinet": fibinet,
    "xdeepfm": xdeepfm,
}
