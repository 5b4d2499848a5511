import pytest
from pydantic import BaseModel, ConfigDict

from configs.load import ConfigError, describe_keys, dump_config, load_config, run_name
from configs.schema import Section


class Robe(Section):
    block_size: int = 8
    """Z."""


class Deep(Section):
    layers: tuple[int, ...] = (4, 2)


class Single(BaseModel):
    """Options as a library declares them: a pydantic model that knows nothing of configs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    steps: int = 1
    """Steps at a time."""

    def check_world_size(self, world_size: int) -> None:
        if self.steps > 1 and world_size > 1:
            raise ValueError(f"steps = {self.steps}: for one rank")


CHOICES = {
    "data": ("dataset", {"rows": Section}),
    "model": ("architecture", {"deep": Deep}),
    "embedding": ("method", {"robe": Robe, "full": Section, "single": Single}),
}

BASE = """
[data]
dataset = "rows"
[model]
architecture = "deep"
embedding_dim = 4
[embedding]
method = "robe"
compression = 10
[embedding.robe]
block_size = 16
[optimizer]
dense_learning_rate = 0.1
embedding_learning_rate = 1.0
[training]
global_batch_size = 64
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def load(path, *overrides):
    return load_config(path, overrides, CHOICES)


def test_file_base_and_overrides_are_laid_over_each_other(write):
    write(BASE, "base.toml")
    path = write('base = "base.toml"\n[embedding]\ncompression = 100\n[model.deep]\nlayers = [8]')
    config = load(path, "training.global_batch_size=128", "run.dir=some/where")
    assert (config.embedding.compression, config.training.global_batch_size) == (100, 128)
    assert config.embedding.options == Robe(block_size=16)
    assert config.model.options == Deep(layers=(8,))
    assert (config.run.name, config.run.dir) == ("run", "some/where")


def test_a_base_file_does_not_hand_on_its_name(write):
    base = write(f'{BASE}[run]\nname = "first"\nseed = 3\n', "base.toml")
    heir = write('base = "base.toml"', "heir.toml")
    named = write('base = "heir.toml"\nrun.name = "second"', "named.toml")
    assert [load(path).run.name for path in (base, heir, named)] == ["first", "heir", "second"]
    assert [run_name(path) for path in (base, heir, named, "lost.toml")] == ["first", "heir", "second", "lost"]
    assert load(heir).run.seed == 3
    assert load(named, "run.name=third").run.name == "third"


def test_choosing_another_method_leaves_the_keys_of_the_first_behind(write):
    config = load(write(BASE), "embedding.method=full", "embedding.compression=1")
    assert config.embedding.options == Section()


def test_options_are_any_pydantic_model_and_may_ask_for_one_rank(write):
    keys = ["embedding.method=single", "embedding.single.steps=4"]
    config = load(write(BASE), *keys)
    assert config.embedding.options == Single(steps=4)
    assert load(write(dump_config(config, CHOICES), "again.toml")).embedding == config.embedding
    with pytest.raises(ConfigError, match=r"override 'embedding.single.steps=4': embedding.single: steps = 4: for one"):
        load(write(BASE), *keys, "parallelism.world_size=2")
    load(write(BASE), "embedding.method=single", "parallelism.world_size=2")
    with pytest.raises(ConfigError, match=r"embedding\.single\.step = 4: unknown key"):
        load(write(BASE), "embedding.single.step=4")


def test_a_dumped_config_loads_to_the_same_config(write):
    config = load(write(BASE), "run.seed=3")
    dumped = dump_config(config, CHOICES)
    assert load(write(dumped, "again.toml")) == config
    assert "patience = 0" in dumped  # defaults are written out


MISTAKES = [
    ("[embedding]\n", "[embedding]\ncompresion = 3\n", ["embedding.compresion = 3", "unknown key", "compression?"]),
    ("block_size = 16", "blok_size = 16", ["embedding.robe.blok_size = 16", "did you mean block_size?"]),
    ('"robe"', '"rob"', ["embedding.method = 'rob'", "did you mean robe?", "known: full, robe, single"]),
    ("[embedding.robe]", "[embedding.rope]", ["[embedding.rope]", "unknown method", "full, robe"]),
    ("compression = 10", "compression = 0.5", ["embedding.compression = 0.5", "greater than or equal to 1"]),
    ("compression = 10", 'compression = "10"', ["embedding.compression = '10'", "valid number"]),
    ("embedding_dim = 4", "embedding_dim = 4.0", ["model.embedding_dim = 4.0", "integer"]),
    ("global_batch_size = 64", "", ["training.global_batch_size is missing"]),
    ("[training]", "[trainin]", ["trainin", "unknown key", "training"]),
    ("[training]", "[training]\nstop_at_target = true", ["training", "stop_at_target needs target_auc"]),
    ("[training]", "[parallelism]\nworld_size = 3\n[training]", ["training.global_batch_size = 64", "world_size = 3"]),
    ("[training]", '[parallelism]\nsharding = "rows"\n[training]', ["parallelism.sharding = 'rows'", "'row_wise'"]),
    ("[data]", "[data", ["not valid TOML", "line 2"]),
]


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES)
def test_a_mistake_is_named_with_file_key_value_and_what_is_allowed(write, old, new, words):
    assert old in BASE
    with pytest.raises(ConfigError) as error:
        load(write(BASE.replace(old, new)))
    for word in ["run.toml", *words]:
        assert word in str(error.value), str(error.value)


def test_the_source_of_a_mistake_is_the_file_or_override_that_set_it(write):
    write(BASE.replace("compression = 10", "compression = 0.1"), "base.toml")
    path = write('base = "base.toml"')
    with pytest.raises(ConfigError, match=r"base.toml: embedding.compression"):
        load(path)
    with pytest.raises(ConfigError, match=r"override 'embedding.compression=0.2': embedding.compression = 0.2"):
        load(path, "embedding.compression=0.2")


def test_every_mistake_is_listed(write):
    with pytest.raises(ConfigError) as error:
        load(write(BASE), "training.epochs=-1", "run.seed=x", "logging.often=1")
    assert [word in str(error.value) for word in ("training.epochs", "run.seed", "logging.often")] == [True] * 3


@pytest.mark.parametrize("override", ["training.epochs", "epochs=1", ".epochs=1", "=1", "training..epochs=1"])
def test_a_malformed_override_is_refused(write, override):
    with pytest.raises(ConfigError, match=r"section.key=value"):
        load(write(BASE), override)


def test_missing_and_circular_files(write, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"gone.toml.*named as base by .*run.toml"):
        load(write('base = "gone.toml"'))
    write('base = "run.toml"', "other.toml")
    with pytest.raises(ConfigError, match="circle"):
        load(write('base = "other.toml"'))


def test_help_lists_every_key_with_meaning():
    text = describe_keys(CHOICES)
    assert "[embedding.robe]\n  block_size  (int, default 8)\n      Z." in text
    assert "global_batch_size  (int, required)" in text
