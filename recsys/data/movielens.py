"""MovieLens ratings as a dataset: does a user rate a movie `positive_rating` or higher?

    label   rating ≥ positive_rating
    ids     user; movie; genre: the first one listed of the movie; hour of the day (UTC) of the rating
    dense   year: decades from 2000 to the release year at the end of the title, 0 where there is none
    splits  random: a permutation of the rows drawn from `split_seed`, cut into train, validation, test

Ids are numbered by falling frequency in the training rows from 1; 0 is what the training rows do not have. Nothing else
is fitted to rows, and no feature is made of ratings: the label cannot leak into them.

A rating with an empty cell, or from before 1995, when MovieLens began, is damaged (a file that was cut off ends in
such a row): it is left out, counted in `damaged_rows`, and a warning says so.

The files are those of GroupLens, or the same columns in Parquet; both are read into memory, 40 bytes a rating.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from pydantic import Field, model_validator

from configs.schema import Section
from recsys.data.dataset import Dataset, Rows, check_fractions
from recsys.data.ids import build_dictionary

TABLES = ("ratings", "movies")
FEATURE_NAMES = ("user", "movie", "genre", "hour")
RATING_COLUMNS = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
MOVIE_COLUMNS = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
BEGINNING_OF_1995 = 788_918_400  # in seconds since 1970, as all timestamps are

_logger = logging.getLogger(__name__)


class Options(Section):
    """Which ratings are taken, what makes them positive, and how they are split."""

    ratings: str = Field(min_length=1)
    """File of userId, movieId, rating, timestamp: .csv as GroupLens publishes it, or Parquet."""
    movies: str = Field(min_length=1)
    """File of movieId, title, genres: .csv or Parquet."""
    positive_rating: float = 4.0
    """Ratings from here on are the positive class."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Part of the rows that selects the best evaluation; 0: no validation split."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the rows that is scored at every evaluation and never trained on."""
    split_seed: int = Field(default=0, ge=0)
    """Seeds the permutation that the splits are cut from."""

    @model_validator(mode="after")
    def _leave_training_rows(self) -> Self:
        check_fractions(self.validation_fraction, self.test_fraction)
        return self


class Ratings(NamedTuple):
    """What is read of n ratings."""

    values: tuple[np.ndarray, ...]
    """Of FEATURE_NAMES, each (n,) int64."""
    year: np.ndarray
    """(n,) float32."""
    labels: np.ndarray
    """(n,) float32."""


class MovieLens(Dataset):
    """The three splits of the ratings, in memory."""

    Options = Options
    files = "a directory with MovieLens' *ratings and *movies, .csv or .parquet"
    dense_names = ("year",)
    feature_names = FEATURE_NAMES

    def __init__(self, options: Options) -> None:
        ratings, self.damaged_rows = _read_ratings(options)
        """Ratings that were left out."""
        places = _split_places(options, ratings.labels)
        ids = np.empty((len(ratings.labels), len(FEATURE_NAMES)), np.int64)
        sizes = []
        for column, values in enumerate(ratings.values):
            dictionary = build_dictionary(pa.chunked_array([values[places["train"]]]), 1, None)
            ids[:, column] = dictionary.encode(pa.array(values))
            sizes.append(dictionary.num_embeddings)
        self.num_embeddings = tuple(sizes)
        year = ratings.year[:, None]
        self._rows = {split: Rows(year[at], ids[at], ratings.labels[at]) for split, at in places.items()}
        self.splits = {split: len(rows) for split, rows in self._rows.items()}

    @classmethod
    def from_path(cls, path: Path) -> dict[str, str] | None:
        """Return the options that name the two files of a directory, *ratings and *movies, .csv or .parquet."""
        files = sorted(path.iterdir()) if path.is_dir() else []
        tables = [file for file in files if file.suffix in (".csv", ".parquet")]
        found = {what: next((file for file in tables if file.stem.endswith(what)), None) for what in TABLES}
        named = {what: str(file.resolve()) for what, file in found.items() if file is not None}
        return named if len(named) == len(TABLES) else None

    @classmethod
    def build(cls, options: Options, cache_dir: Path) -> Self:
        """Return the dataset; it keeps nothing in `cache_dir`.

        Raises FileNotFoundError where a file is missing; ValueError, naming the file and what was found, where one
        cannot be read or lacks a column, where ratings are of movies that the movies file does not have, and where a
        split is empty or has one class only, for which AUC is undefined.
        """
        del cache_dir
        return cls(options)

    def read_split(self, split: str, indices: np.ndarray) -> Rows:
        rows = self._rows[split]
        return Rows(rows.dense[indices], rows.ids[indices], rows.labels[indices])

    def fingerprint(self) -> str:
        """Return a digest of all rows as they are read: of the files' content and every option that changes it."""
        digest = hashlib.blake2b(digest_size=16)
        for split, rows in self._rows.items():
            for array in (rows.dense, rows.ids, rows.labels):
                digest.update(f"{split} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()


def _read_ratings(options: Options) -> tuple[Ratings, int]:
    """Return the ratings in the order of the file, without the damaged ones, and how many those are."""
    table = _read_table("ratings", Path(options.ratings), RATING_COLUMNS)
    whole = table.drop_null()
    whole = whole.filter(pc.greater_equal(whole["timestamp"], BEGINNING_OF_1995))  # type: ignore[attr-defined]
    damaged = table.num_rows - whole.num_rows
    if damaged:
        _logger.warning(
            "MovieLens: %s: %d of %d rows are left out: an empty cell, or a timestamp before 1995",
            options.ratings, damaged, table.num_rows,
        )  # fmt: skip
    columns = {name: whole[name].to_numpy() for name in RATING_COLUMNS}
    movies, genres, years = _read_movies(Path(options.movies))
    if not len(movies):
        raise ValueError(f"MovieLens: {options.movies}: no movies")
    place = np.minimum(np.searchsorted(movies, columns["movieId"]), len(movies) - 1)
    unknown = np.setdiff1d(columns["movieId"], movies)
    if len(unknown):
        raise ValueError(
            f"MovieLens: {options.ratings} has ratings of {len(unknown)} movies that {options.movies} does not have, "
            f"movieId {unknown[0]} for one"
        )
    values = (columns["userId"], columns["movieId"], genres[place], columns["timestamp"] // 3600 % 24)
    labels = (columns["rating"] >= options.positive_rating).astype(np.float32)
    return Ratings(values, years[place], labels), damaged


def _read_movies(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every movieId once, ascending; its first genre, by place in the alphabet; and its year as a feature."""
    table = _read_table("movies", path, MOVIE_COLUMNS)
    movies, first = np.unique(table["movieId"].to_numpy(), return_index=True)
    first_genre = [(genres or "").partition("|")[0] for genres in table["genres"].to_pylist()]
    genres = np.unique(first_genre, return_inverse=True)[1].astype(np.int64)
    found = pc.extract_regex(table["title"], r"\((?P<year>\d{4})\)\s*$")  # type: ignore[attr-defined]
    years = pc.struct_field(found, "year").cast(pa.float32()).fill_null(2000).to_numpy()  # type: ignore[attr-defined]
    return movies, genres[first], ((years - 2000) / 10)[first]


def _read_table(what: str, path: Path, columns: dict[str, pa.DataType]) -> pa.Table:
    """Return the columns of a file, in their types."""
    if not path.is_file():
        raise FileNotFoundError(f"MovieLens: no {what} file {path}: set data.movielens.{what}")
    try:
        table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"MovieLens: {path} cannot be read: {error}") from error
    if missing := columns.keys() - set(table.column_names):
        raise ValueError(f"MovieLens: {path} has no column {', '.join(sorted(missing))}: {table.column_names}")
    try:
        return table.select(list(columns)).cast(pa.schema(list(columns.items())))
    except pa.ArrowInvalid as error:
        raise ValueError(f"MovieLens: {path}: {error}") from error


def _split_places(options: Options, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each split of labels (n,) the places of its rows in the file, in random order."""
    n = len(labels)
    num_validation, num_test = round(n * options.validation_fraction), round(n * options.test_fraction)
    order = np.random.default_rng(options.split_seed).permutation(n)
    cuts = [n - num_validation - num_test, n - num_test]
    train, validation, test = np.split(order, cuts)
    places = {"train": train, "validation": validation, "test": test}
    _check_splits(options, {split: labels[at] for split, at in places.items()})
    return places


def _check_splits(options: Options, labels: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError where a split has one class only."""
    for split, own in labels.items():
        if split == "validation" and options.validation_fraction == 0:
            continue
        positive = int(np.sum(own))
        if positive in (0, len(own)):
            raise ValueError(
                f"MovieLens: {options.ratings}: {positive} of the {len(own)} rows of split {split!r} have a rating of "
                f"{options.positive_rating} or more: AUC is undefined with one class only"
            )
