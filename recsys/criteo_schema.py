"""What a Criteo row is: label, 13 integers, 26 categories; and how many distinct categories the two public sets hold.

Sources: Criteo Kaggle display-advertising challenge and Criteo 1TB click logs, cardinalities as published with the
DLRM reference and with TorchRec's benchmark of `EmbeddingBagCollection`.
"""

DENSE_NAMES = tuple(f"I{i}" for i in range(1, 14))
FEATURE_NAMES = tuple(f"C{i}" for i in range(1, 27))

CARDINALITIES: dict[str, tuple[int, ...]] = {
    "criteo_kaggle": (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
        27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    ),
    "criteo_tb": (
        45833188, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, 29275261, 1572176, 345138, 10,
        2209, 11267, 128, 4, 974, 14, 48937457, 11316796, 40094537, 452104, 12606, 104, 35,
    ),
}  # fmt: skip
