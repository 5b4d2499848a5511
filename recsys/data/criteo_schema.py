"""What a Criteo row is: label, 13 integers, 26 categories; and how many distinct categories the two public sets hold.

Sources: Criteo Kaggle display-advertising challenge and Criteo 1TB click logs (all 24 days), cardinalities as published
with the DLRM reference. Capped at 40 M rows a table, those of the 1TB logs are MLPerf's: 204,184,588 rows in all.
"""

DENSE_NAMES = tuple(f"I{i}" for i in range(1, 14))
FEATURE_NAMES = tuple(f"C{i}" for i in range(1, 27))

CARDINALITIES: dict[str, tuple[int, ...]] = {
    "criteo_kaggle": (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
        27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    ),
    "criteo_tb": (
        227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10,
        2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
    ),
}  # fmt: skip
