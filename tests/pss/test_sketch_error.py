import json
import math
import re

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from launch.theory import main
from pss.methods.robe import RobeEmbeddingBagCollection, cell
from pss.theory.bounds import pairwise_eps
from pss.theory.sketch_error import (
    Reference,
    confident,
    find_slope,
    measure,
    measure_module,
    sweep,
)
from pss.theory.sketches import EXPLICIT
from pss.theory.tables import load_table, power_law_table, random_table
from tests.pss.jagged import table

SIGNED = ["gaussian", "achlioptas", "sparse", "hashing"]


def matrix(sketch, size, columns, seed, block=4096):
    """S (k, n) as `measure` draws it, in one piece."""
    parts = []
    for start in range(0, columns, block):
        rng = np.random.default_rng((seed, start))
        drawn = EXPLICIT[sketch](size, min(block, columns - start), rng, 4)
        parts.append(drawn if isinstance(drawn, np.ndarray) else drawn.toarray())
    return np.concatenate(parts, axis=1).astype(np.float64)


@pytest.mark.parametrize("sketch", SIGNED)
def test_sketches_keep_squares_on_average(sketch):
    """E[SᵀS] = I: 400 vectors of norm 1, each in 20 sketches of 64 rows; one square has a variance of 2/k at most."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((50, 400))
    vectors /= np.linalg.norm(vectors, axis=0)
    squares = np.stack([((matrix(sketch, 64, 50, seed) @ vectors) ** 2).sum(0) for seed in range(20)])
    assert squares.mean() == pytest.approx(1, abs=0.02)
    assert 0.5 < squares.var() * 64 / 2 < 1.5
    entries = matrix(sketch, 64, 2000, 3)
    assert abs(entries.mean()) < 4 * 64**-0.5 / math.sqrt(entries.size)


def test_each_sketch_has_the_entries_of_its_paper():
    achlioptas = matrix("achlioptas", 30, 3000, 0)
    np.testing.assert_allclose(np.unique(achlioptas), np.array([-1, 0, 1]) * math.sqrt(0.1), rtol=1e-6)
    assert (achlioptas == 0).mean() == pytest.approx(2 / 3, abs=0.01)
    sparse = matrix("sparse", 32, 3000, 0).reshape(4, 8, 3000)
    assert ((sparse != 0).sum(1) == 1).all()
    np.testing.assert_allclose(np.unique(np.abs(sparse)), [0, 0.5])
    hits = (sparse != 0).sum(2)
    assert hits.min() > 280
    assert hits.max() < 470
    unsigned = matrix("hashing-unsigned", 8, 3000, 0)
    assert (unsigned.sum(0) == 1).all()
    assert set(np.unique(unsigned)) == {0, 1}


@pytest.mark.parametrize("sketch", EXPLICIT)
def test_errors_equal_plain_loops(sketch):
    """Over two blocks of columns. Norms through eigenvalues; rows one number after the other."""
    rows = power_law_table(4200, 3, 0.4, seed=5)
    rows[[7, 4150]] = [[2.0, 0, 0], [0, 3.0, 1.0]]
    reference = Reference(rows, rho=0.2)
    sketching, exact = matrix(sketch, 16, 4200, seed=9), rows.astype(np.float64)
    compressed = sketching @ exact
    found = measure(reference, sketch, 16, seed=9, nonzeros=4)
    gram = exact.T @ exact
    difference = compressed.T @ compressed - gram
    top = np.linalg.eigvalsh(gram)[-1]
    assert found.macro == pytest.approx(np.abs(np.linalg.eigvalsh(difference)).max() / top, rel=1e-5)
    root = np.linalg.inv(np.linalg.cholesky(gram))
    assert found.subspace == pytest.approx(np.abs(np.linalg.eigvalsh(root @ difference @ root.T)).max(), rel=1e-5)
    worst, counted = 0.0, 0
    for i in range(4200):
        norm = math.sqrt(sum(x * x for x in exact[i]))
        if norm > 0.2 * math.sqrt(top):
            counted += 1
            error = [sum(sketching[r, i] * compressed[r, c] for r in range(16)) - exact[i, c] for c in range(3)]
            worst = max(worst, math.sqrt(sum(x * x for x in error)) / norm)
    assert counted == len(reference.important) > 2
    assert reference.important.max() == 4150
    assert found.micro == pytest.approx(worst, rel=1e-5)


def test_subspace_error_of_a_table_without_full_rank():
    rows = random_table(500, 3, seed=0)
    doubled = np.concatenate([rows, rows], axis=1)
    one, two = (measure(Reference(t, 1.0), "gaussian", 100, seed=2) for t in (rows, doubled))
    assert two.subspace == pytest.approx(one.subspace, rel=1e-6)
    assert math.isnan(one.micro)


@pytest.mark.parametrize("signed", [False, True])
def test_a_module_is_measured_as_the_matrix_of_its_lookup(signed):
    module = RobeEmbeddingBagCollection([table("t", 12, 4)], memory_size=9, block_size=2, signed=signed, seed=4)
    rows = random_table(12, 4, seed=3)
    lookup = np.zeros((12, 4, 9))
    for place in range(9):
        with torch.no_grad():
            module.memory.zero_()[place] = 1
        for i in range(12):
            for c in range(4):
                lookup[i, c, place] = cell(module, 0, i, c)
    memory = np.einsum("icp,ic->p", lookup, rows)
    recovered = lookup @ memory
    reference = Reference(rows, rho=0.4)
    assert 0 < len(reference.important) < 12
    worst = max(np.linalg.norm(recovered[i] - rows[i]) / np.linalg.norm(rows[i]) for i in reference.important)
    found = measure_module(reference, module)
    assert found.micro == pytest.approx(worst, rel=1e-5)
    assert math.isnan(found.macro)


def test_a_micro_error_bounds_pairs_as_theorem_4_says():
    rows = random_table(40, 4, seed=0).astype(np.float64)
    sketching = matrix("gaussian", 30, 40, seed=0)
    recovered = sketching.T @ (sketching @ rows)
    norms = np.linalg.norm(rows, axis=1)
    eps = (np.linalg.norm(recovered - rows, axis=1) / norms).max()
    pairs = np.abs(recovered @ recovered.T - rows @ rows.T) / np.outer(norms, norms)
    assert pairs.max() <= eps * eps + 2 * eps
    assert pairs.max() > pairwise_eps(0.2)


def test_the_empirical_error_covers_a_further_sketch():
    """The quantile of uniform errors is on average the share of further ones it covers: exactly 1 - δ here."""
    rng = np.random.default_rng(0)
    for count, delta in ((19, 0.05), (39, 0.05), (9, 0.3)):
        covered = np.mean([confident(list(rng.random(count)), delta) for _ in range(4000)])
        assert covered == pytest.approx(1 - delta, abs=0.006)
    assert confident([3, 1, 2], 0.5) == 2
    with pytest.raises(ValueError, match=r"seeds must be at least 99 for delta 0\.01, not 98"):
        confident([1.0] * 98, 0.01)


def test_the_error_falls_by_the_root_of_the_rows():
    points = sweep(
        Reference(random_table(1200, 8, seed=0), rho=1.0), ["gaussian"], [128, 256, 512, 1024], seeds=19, delta=0.05
    )
    for kind in ("macro", "subspace"):
        slope = find_slope([p.rows for p in points], [getattr(p.measured, kind) for p in points])
        assert slope == pytest.approx(-0.5, abs=0.1)
    assert find_slope([1, 10, 100], [7.0, 0.7, 0.07]) == pytest.approx(-1)
    assert math.isnan(find_slope([10, 20], [math.nan, 1.0]))


@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_measured_errors_stay_below_the_bounds(exponent):
    """And the Gaussian one within a factor of 2.5, so that a wrong scale shows."""
    reference = Reference(power_law_table(1000, 6, exponent, seed=1), rho=0.3 if exponent else 0.07)
    assert len(reference.important) > 1
    points = sweep(reference, [*SIGNED, "robe"], [96, 768], seeds=19, delta=0.05)
    for point in points:
        assert point.micro.eps > point.measured.micro > 0
        if point.sketch != "robe":
            assert point.macro.eps > point.measured.subspace >= point.measured.macro - 1e-12 > 0
    by_sketch = {(p.sketch, p.rows): p for p in points}
    assert by_sketch["achlioptas", 768].macro.bound == "net of 9^d points"
    assert by_sketch["sparse", 768].macro.bound == "second moment"
    gaussian = by_sketch["gaussian", 768]
    assert gaussian.macro.eps < 2.5 * gaussian.measured.subspace
    assert (gaussian.parameters, gaussian.compression) == (768 * 6, pytest.approx(1000 / 768))
    assert by_sketch["robe", 96].parameters == 96 * 6 + 5
    assert math.isinf(by_sketch["robe", 96].macro.eps)


def test_unsigned_sketches_are_biased_and_promised_nothing():
    """All rows alike: collisions add up. ‖MᵀM‖ grows by the square of what lands in a bucket."""
    reference = Reference(np.ones((2000, 2)) + 0.1 * random_table(2000, 2, seed=0), rho=1.0)
    points = sweep(reference, ["hashing", "hashing-unsigned"], [100], seeds=19, delta=0.05)
    assert points[0].measured.macro < 1
    assert points[1].measured.macro > 10
    assert math.isinf(points[1].macro.eps)


def test_tables_are_read_from_arrays_tensors_and_checkpoints(tmp_path):
    one, two = random_table(9, 4, seed=0), random_table(7, 4, seed=1)
    np.save(tmp_path / "e.npy", one.astype(np.float64))
    torch.save(torch.from_numpy(one), tmp_path / "e.pt")
    torch.save({"a": torch.from_numpy(one), "b": torch.from_numpy(two), "n": 3}, tmp_path / "many.pt")
    weights = {f"embedding.embedding_bags.{name}.weight": torch.from_numpy(t) for name, t in (("u", one), ("v", two))}
    state = {"model": {**weights, "bias": torch.zeros(3)}, "optimizer": {"embedding_bags.w.weight": torch.zeros(2, 2)}}
    save(state, checkpoint_id=tmp_path / "step_1", no_dist=True)
    for source, expected in (("e.npy", one), ("e.pt", one), ("many.pt:b", two), ("step_1:u", one), ("step_1:v", two)):
        np.testing.assert_array_equal(load_table(str(tmp_path / source)), expected)
    with pytest.raises(ValueError, match=r"step_1 cannot be read: choose one .*step_1:u, out of u, v$"):
        load_table(str(tmp_path / "step_1"))
    with pytest.raises(ValueError, match=r"many.pt:c cannot be read: choose .* out of a, b$"):
        load_table(str(tmp_path / "many.pt:c"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.npy", np.zeros((3, 2)), "zeros"),
        ("x.npy", np.full((3, 2), np.nan), "not finite"),
        ("x.npy", np.ones(5), r"shape \(5,\)"),
        ("x.npy", b"garbage", "cannot be read"),
        ("x.pt", b"garbage", "cannot be read"),
        ("x.csv", b"1,2", "none of .npy, .pt"),
        ("step_1/x", b"", "no checkpoint"),
    ],
)
def test_unreadable_tables_are_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    source = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=said) as raised:
        load_table(str(source))
    assert str(source) in str(raised.value)


def test_the_page_holds_what_was_measured_and_fetches_nothing(tmp_path, capsys):
    page = tmp_path / "new" / "sketch_error.html"
    words = "measure --rows 300 --dim 3 --exponent 1 --sketch gaussian,robe --sizes 64,128 --seeds 3 --delta 0.3"
    assert main([*words.split(), "--output", str(page.parent)], standalone_mode=False) is None
    printed = capsys.readouterr().out
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", text)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])  # pyright: ignore[reportOptionalSubscript]
    macro, micro = figures
    assert [line["name"].split(" (")[0] for line in macro["data"]] == ["gaussian, measured", "gaussian, bound"]
    assert len(micro["data"]) == 4
    assert macro["layout"]["xaxis"]["type"] == macro["layout"]["yaxis"]["type"] == "log"
    points = sweep(Reference(power_law_table(300, 3, 1.0, seed=0), 0.1), ["gaussian"], [64, 128], seeds=3, delta=0.3)
    measured, bound = macro["data"]
    assert measured["x"] == bound["x"] == [64, 128]
    np.testing.assert_allclose(measured["y"], [point.measured.macro for point in points], rtol=1e-4)
    np.testing.assert_allclose(bound["y"], [point.macro.eps for point in points], rtol=1e-4)
    assert "slope of log ε on log k, gaussian: macro -" in printed


def test_a_page_that_cannot_be_written_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = "measure --rows 50 --dim 2 --sketch hashing --sizes 10 --seeds 1 --delta 0.5 --output"
    with pytest.raises(SystemExit) as stopped:
        main([*words.split(), str(tmp_path / "file" / "directory")])
    assert stopped.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
