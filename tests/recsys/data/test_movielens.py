"""MovieLens ratings as a dataset, against plain Python: features, ids, splits, and what it refuses."""

import logging
import os
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from recsys.data.movielens import MovieLens, Options

DATA = Path(os.environ.get("PSS_BENCH_DATA", Path(__file__).parents[3] / "../shared/data"))
REAL = DATA / "ml206k_ratings.parquet"
SPLITS = ("train", "validation", "test")
NUM_ROWS, FIRST_YEAR = 400, 1000
GENRES = ("Comedy|Drama", "Drama", "Action|Comedy", "(no genres listed)", "Drama|Action")


def movie_of(row: int) -> int:
    """Every movie has one rating, and a release year of its own: a row is known by its dense feature."""
    return 7 * (NUM_ROWS - row)


def draw_tables(num_rows: int = NUM_ROWS) -> tuple[dict, dict]:
    """Columns of ratings and of movies; the latter in another order, with a movie that nobody rated."""
    rng = np.random.default_rng(0)
    rows = range(num_rows)
    ratings = {
        "userId": rng.zipf(1.5, num_rows).clip(max=60).tolist(),
        "movieId": [movie_of(row) for row in rows],
        "rating": (rng.integers(1, 11, num_rows) / 2).tolist(),
        "timestamp": rng.integers(800_000_000, 1_700_000_000, num_rows).tolist(),
    }
    shown = [*rng.permutation(num_rows).tolist(), num_rows]
    movies = {
        "movieId": [movie_of(row) for row in shown],
        "title": [f"Movie (a.k.a. ({row})) ({FIRST_YEAR + row})" for row in shown],
        "genres": [GENRES[row % 17 % len(GENRES)] for row in shown],
    }
    return ratings, movies


def write_options(directory: Path, ratings: dict, movies: dict, **options) -> Options:
    directory.mkdir(exist_ok=True)
    for name, columns in (("ratings", ratings), ("movies", movies)):
        pyarrow.parquet.write_table(pa.table(columns), directory / f"{name}.parquet")
    paths = {name: str(directory / f"{name}.parquet") for name in ("ratings", "movies")}
    return Options.model_validate(paths | options)


@pytest.fixture
def make(tmp_path):
    """make(change, **options) -> the dataset of the drawn tables, of which `change` may edit the columns first."""

    def make(change=lambda ratings, movies: None, **options):
        ratings, movies = draw_tables()
        change(ratings, movies)
        return MovieLens.build(write_options(tmp_path / "data", ratings, movies, **options), Path())

    return make


def rows_of(dataset: MovieLens, split: str):
    """The split's rows, and the places in the file of ratings that they come from."""
    rows = dataset.read(split, np.arange(dataset.num_rows(split)))
    return rows, [round(10 * float(year)) + 2000 - FIRST_YEAR for year in rows.dense[:, 0]]


def raw_values(ratings: dict, row: int) -> tuple:
    genre = GENRES[row % 17 % len(GENRES)].split("|")[0]
    return ratings["userId"][row], ratings["movieId"][row], genre, ratings["timestamp"][row] // 3600 % 24


def test_shapes_and_types(make):
    dataset = make()
    rows = dataset.read("train", np.arange(10))
    assert (dataset.dense_names, dataset.feature_names) == (("year",), ("user", "movie", "genre", "hour"))
    assert (rows.dense.shape, rows.ids.shape, rows.labels.shape) == ((10, 1), (10, 4), (10,))
    assert (rows.dense.dtype, rows.ids.dtype, rows.labels.dtype) == (np.float32, np.int64, np.float32)
    assert dataset.best_possible() is None


def test_every_rating_is_in_one_split(make):
    places = {split: rows_of(make(), split)[1] for split in SPLITS}
    assert {split: len(own) for split, own in places.items()} == {"train": 320, "validation": 40, "test": 40}
    assert sorted(chain.from_iterable(places.values())) == list(range(NUM_ROWS))
    assert places["test"] != sorted(places["test"])


def test_labels_and_ids_of_every_row(make):
    """Ids by falling frequency in the training rows, ties by value (genres: by name), 0 for what they do not have."""
    ratings, dataset = draw_tables()[0], make()
    train = [raw_values(ratings, row) for row in rows_of(dataset, "train")[1]]
    numbers = []
    for counts in (Counter(values) for values in zip(*train, strict=True)):
        ranked = sorted(counts, key=lambda value, counts=counts: (-counts[value], value))
        numbers.append({value: place for place, value in enumerate(ranked, start=1)})
    assert dataset.num_embeddings == tuple(len(own) + 1 for own in numbers)
    for split in SPLITS:
        rows, places = rows_of(dataset, split)
        for k, place in enumerate(places):
            assert rows.labels[k] == (ratings["rating"][place] >= 4)
            raw = raw_values(ratings, place)
            assert rows.ids[k].tolist() == [own.get(value, 0) for own, value in zip(numbers, raw, strict=True)]
        assert (rows.ids[:, 1] == 0).all() == (split != "train"), "nobody else rated these movies"


def test_the_class_begins_at_the_rating_asked_for(make):
    ratings = draw_tables()[0]["rating"]
    rows, places = rows_of(make(positive_rating=2.5), "train")
    assert rows.labels.tolist() == [float(ratings[place] >= 2.5) for place in places]


def test_a_title_without_a_year_is_zero(make):
    def change(ratings, movies):
        movies["title"] = ["Nocturnal Animals (1984) again", *movies["title"][1:]]
        movies["title"][5] = None

    years = np.concatenate([rows_of(make(change), split)[0].dense for split in SPLITS])
    assert (years == 0).sum() == 2


def test_the_splits_follow_their_seed_and_fractions(make):
    def places(**options):
        dataset = make(**options)
        return {split: rows_of(dataset, split)[1] for split in SPLITS}

    assert places() == places(split_seed=0)
    first, second = places(), places(split_seed=1)
    assert len(set(first["test"]) & set(second["test"])) < 20
    sizes = {split: len(own) for split, own in places(validation_fraction=0.25, test_fraction=0.5).items()}
    assert sizes == {"train": 100, "validation": 100, "test": 200}
    assert places(validation_fraction=0.0)["validation"] == []


def test_the_fingerprint_changes_with_rows_ids_and_splits_alone(make, tmp_path):
    def swap(ratings, movies):
        ratings["userId"][3] += 1000

    fingerprint = make().fingerprint()
    ratings, movies = draw_tables()
    assert MovieLens.build(write_options(tmp_path / "elsewhere", ratings, movies), Path()).fingerprint() == fingerprint
    others = {
        fingerprint,
        make(swap).fingerprint(),
        make(split_seed=1).fingerprint(),
        make(positive_rating=3.0).fingerprint(),
        make(test_fraction=0.2).fingerprint(),
        make(validation_fraction=0.0).fingerprint(),
    }
    assert len(others) == 6


def test_the_published_csv_gives_the_same_rows(make, tmp_path):
    dataset, tables = make(), draw_tables()
    tables[1]["title"] = [f"{title.replace('Movie', 'Movie, the', 1)}" for title in tables[1]["title"]]
    for name, columns in zip(("ratings", "movies"), tables, strict=True):
        pyarrow.csv.write_csv(pa.table(columns), tmp_path / f"{name}.csv")
    options = Options(ratings=str(tmp_path / "ratings.csv"), movies=str(tmp_path / "movies.csv"))
    assert MovieLens.build(options, Path()).fingerprint() == dataset.fingerprint()


def test_damaged_rows_are_left_out_and_counted(make, caplog):
    def damage(ratings, movies):
        ratings["timestamp"][NUM_ROWS - 1] //= 1000  # the end of a file that was cut off
        ratings["userId"][3] = ratings["rating"][5] = None

    with caplog.at_level(logging.WARNING):
        dataset = make(damage)
    places = chain.from_iterable(rows_of(dataset, split)[1] for split in SPLITS)
    assert sorted(places) == [row for row in range(NUM_ROWS - 1) if row not in (3, 5)]
    assert dataset.damaged_rows == 3
    assert "3 of 400 rows are left out" in caplog.text
    caplog.clear()
    assert make().damaged_rows == 0
    assert not caplog.records


def test_rows_outside_a_split_are_refused(make):
    dataset = make()
    for indices in ([-1], [40], [0, 40, 5]):
        with pytest.raises(IndexError, match="of 'test', which has 40"):
            dataset.read("test", np.array(indices))
    with pytest.raises(ValueError, match="split 'tset' is none of train, validation, test"):
        dataset.num_rows("tset")
    assert len(dataset.read("test", np.empty(0, np.int64))) == 0


def remove_timestamps(ratings, movies):
    del ratings["timestamp"]


def forget_movies(ratings, movies):
    for column in movies.values():
        del column[200:]


def name_users(ratings, movies):
    ratings["userId"] = [f"user {user}" for user in ratings["userId"]]


def rate_all_alike(ratings, movies):
    ratings["rating"] = [5.0] * NUM_ROWS


def keep_three(ratings, movies):
    for column in ratings.values():
        del column[3:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_timestamps, r"ratings\.parquet has no column timestamp"),
        (forget_movies, r"ratings of 200 movies that .*movies\.parquet does not have, movieId \d+ for one"),
        (name_users, r"ratings\.parquet: .*user"),
        (rate_all_alike, r"ratings\.parquet: 320 of the 320 rows of split 'train' have a rating of 4.0 or more"),
        (keep_three, r"0 of the 0 rows of split 'validation'"),
    ],
)
def test_data_of_which_nothing_can_be_learned_is_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(change)


def test_files_that_are_missing_or_something_else_are_refused(tmp_path):
    good = write_options(tmp_path, *draw_tables())
    with pytest.raises(FileNotFoundError, match=r"no movies file .*gone\.parquet: set data\.movielens\.movies"):
        MovieLens.build(good.model_copy(update={"movies": str(tmp_path / "gone.parquet")}), Path())
    (tmp_path / "text.parquet").write_text("userId,movieId\n")
    with pytest.raises(ValueError, match=r"text\.parquet cannot be read"):
        MovieLens.build(good.model_copy(update={"ratings": str(tmp_path / "text.parquet")}), Path())
    with pytest.raises(ValidationError, match="leave no rows to train on"):
        Options(ratings="a", movies="b", test_fraction=0.5, validation_fraction=0.5)


@pytest.mark.skipif(not REAL.exists(), reason=f"no MovieLens ratings at {REAL} (set PSS_BENCH_DATA)")
def test_real_ratings():
    dataset = MovieLens.build(Options(ratings=str(REAL), movies=str(REAL.with_name("ml206k_movies.parquet"))), Path())
    assert dataset.damaged_rows == 1
    assert {split: dataset.num_rows(split) for split in SPLITS} == {"train": 165268, "validation": 20658, "test": 20658}
    users, movies, genres, hours = dataset.num_embeddings
    assert (genres, hours) == (20, 25)
    assert 2_130 < users <= 2_150, "of 2,149 users, those with a rating in the training rows"
    assert 11_800 < movies < 12_300, "and so of 13,049 movies"
    labels = np.concatenate([dataset.read(s, np.arange(dataset.num_rows(s))).labels for s in SPLITS])
    assert labels.mean() == pytest.approx(0.509, abs=5e-4)
